"""Generate images of every class with the large U-ViT, for the classifier of stage 3.

    python sample_ldm_all.py --config=configs/accelerate_b4_subset1_2img_k_128_large.py --output_path=log/sample_log
    torchrun --standalone --nproc_per_node=8 sample_ldm_all.py --config=... --output_path=log/sample_log

It takes the averaged network of step --config.train.n_steps, which train_ldm.py wrote, and guidance
--config.sample.scale. An image depends on the seed, its class and its number. The same command again makes what is
missing.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from EDM.imagenet.experiment.config import Config, parse
from EDM.imagenet.experiment.layout import Layout
from EDM.imagenet.train_ldm import MACHINE, check_classes
from EDM.latent.generation import Sampler, write_classes
from EDM.latent.latents import ABOUT, read_latents
from EDM.latent.schedules import ContinuousSchedule, Schedule
from EDM.latent.uvit import load_uvit, make_uvit
from EDM.latent.vae import load_coder
from shared import distributed
from shared.cli import Flag, Option, Text, UserError, run_main
from shared.data.classes import class_folders
from shared.distributed import World
from shared.training.files import make_dir
from shared.training.precision import default_precision, set_arithmetic
from shared.training.record import Record

NETWORK = (
    Option("--output_path", Text, None, "log file", default_help="none", metavar="FILE"),
    Option("--nnet_path", Text, None, "weights of the averaged network, ours or published",
           default_help="the last checkpoint of training", metavar="FILE"),
)
FLAGS = (
    *NETWORK,
    Option("--overwrite", Flag, False, "replace images of another network, VAE or other settings"),
    *MACHINE,
)


def main(doc: str = __doc__, schedule_of: Callable[[Config], Schedule] = lambda config: ContinuousSchedule(config.pred),
         argv: Sequence[str] | None = None) -> None:
    options, config = parse(doc, FLAGS, argv)
    world = distributed.start(options.device)
    layout = Layout(config)
    folder = Path(config.sample.path or layout.generated)
    classes = class_names(layout, config)
    sampler = load_sampler(options, config, schedule_of(config), world)
    check_classes(sampler.net, classes, str(layout.latents))
    scale = config.sample.scale if config.sample.cfg else 0.0

    record = Record(folder, {
        "seed": config.seed, "images a class": config.augmentation_K, "network calls": config.sample.sample_steps,
        "guidance": scale, "batch": config.sample.mini_batch_size, "classes": classes, "precision": sampler.precision,
        "strict": options.strict}, {"the network": network_file(options, config), "the VAE": sampler.coder.fingerprint})
    if distributed.on_main(lambda: begin(record, options.overwrite), world):
        note(options.output_path, f"{config.augmentation_K} images of {len(classes)} classes with "
             f"{network_file(options, config)}: {config.sample.sample_steps} network calls, guidance {scale}", world)
        write_classes(sampler, folder, classes, config.augmentation_K, config.seed, config.sample.mini_batch_size,
                      config.sample.sample_steps, scale, world)
        distributed.barrier(world)
        if world.main:
            record.write()
        note(options.output_path, f"Saved them to \"{folder}\"", world)
    distributed.stop()


def network_file(options: SimpleNamespace, config: Config) -> Path:
    """Return the file of the averaged network's weights."""
    return Path(options.nnet_path or Layout(config).checkpoint(config.train.n_steps) / "nnet_ema.pth")


def load_sampler(options: SimpleNamespace, config: Config, schedule: Schedule, world: World) -> Sampler:
    """Return the averaged network of a configuration with its solver and decoder; UserError."""
    if config.sample.algorithm != "dpm_solver":
        raise UserError(f"--config.sample.algorithm={config.sample.algorithm}: the only algorithm is dpm_solver")
    file = network_file(options, config)
    if not file.is_file():
        raise UserError(f"{file}: no such file; train to step --config.train.n_steps={config.train.n_steps} first, or "
                        "name a file with --nnet_path")
    set_arithmetic(options.strict, tf32=False)
    net = load_uvit(make_uvit(config.nnet, config.z_shape), file).eval().requires_grad_(False).to(world.device)
    net.set_full_precision_attention(options.strict)
    coder = load_coder(config.autoencoder.pretrained_path, config.z_shape, config.resolution,
                       "--config.autoencoder.pretrained_path").to(world.device)
    precision = options.precision or default_precision(world.device, options.strict)
    return Sampler(net, schedule, coder, config.z_shape, precision, options.strict)


def class_names(layout: Layout, config: Config) -> list[str]:
    """Return the names of the classes in label order: those of the latents, or else the folders of training images."""
    if (layout.latents / ABOUT).is_file():
        return list(read_latents(layout.latents, config.z_shape).classes)
    if layout.train_images.is_dir():
        return class_folders(layout.train_images)
    raise UserError(f"{layout.latents}: no latents there that name the classes, and no folder {layout.train_images}; "
                    "give --config.image_path")


def begin(record: Record, overwrite: bool) -> bool:
    """Make the folder the place of these images; False if all are there already."""
    if record.is_complete(overwrite):
        return False
    if not record.path.exists():
        others = sorted(record.output.glob("*/*.png")) if record.output.is_dir() else []
        if others and not overwrite:
            raise UserError(f"{others[0]} is of unknown origin; give --overwrite to replace it and {len(others) - 1} "
                            "more, or another --config.sample.path")
        for path in others:
            path.unlink()
    make_dir(record.output)
    record.begin()
    return True


def note(file: str | None, line: str, world: World) -> None:
    """Print a line, and append it to the log file, if any."""
    if world.main:
        print(line, flush=True)
        if file:
            make_dir(Path(file).absolute().parent)
            with open(file, "a", encoding="utf-8") as log:
                log.write(line + "\n")


if __name__ == "__main__":
    run_main(main)
