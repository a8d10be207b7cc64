"""Generate images with a pre-trained DDAE, as PNG files.

    python sample.py --config config/DDPM_ddpm.yaml --use_amp --epoch 400
    torchrun --standalone --nproc_per_node=4 sample.py --config config/DDPM_ddpm.yaml --use_amp --epoch 400 --mode DDPM

The same command again makes only what is missing.
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from DDAE.ddae import sampling
from DDAE.ddae.checkpoints import find_checkpoint, load_model
from DDAE.ddae.config import COMMON, FAST, Config, choose_precision, read_config
from DDAE.ddae.sampling import BATCH, ImageSampler, folder_name, png_path, to_uint8
from EDM.training import snapshots
from shared import cli, distributed
from shared.cli import Choice, Flag, Float, Int, Option, UserError, less_memory, run_main
from shared.data.writers import PngWriter
from shared.distributed import World
from shared.training.files import taken
from shared.training.precision import set_arithmetic
from shared.training.progress import Progress
from shared.training.randomness import split_batches

# Which image a number stands for.
SAMPLER = (
    *COMMON, *FAST,
    Option("--epoch", Int(-1), -1, "checkpoint; -1: the last epoch of the config"),
    Option("--mode", Choice("DDPM", "DDIM"), "DDIM", "sampler; ignored for EDM"),
    Option("--steps", Int(1), None, "sampler steps; ignored for --mode DDPM", default_help="100; EDM 18"),
    Option("--eta", Float(0), 0.0, "stochasticity"),
    Option("--no_clip", Flag, False, "do not clip predicted images to [-1, 1]"),
    Option("--exact_end", Flag, False, "DDIM with the schedule of training, which ends free of noise; the published "
           "one leaves about 1 %"),
    Option("--batch", Int(1), 100, "largest batch of a process", unit="images"),
)
FLAGS = (
    *SAMPLER,
    Option("--batches", Int(1), 125, "number of batches of 400 images"),
    Option("--images", Int(1), None, "number of images, in place of --batches"),
    Option("--npz", Flag, False, "also write all images into one .npz beside the folder"),
    Option("--overwrite", Flag, False, "replace existing images"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


@less_memory("--batch")
def main() -> None:
    options = parse()
    with ExitStack() as held:
        make_images(options, held)


def make_images(options: SimpleNamespace, held: ExitStack) -> None:
    """Make the images of the options. held: keeps the lock of their folder."""
    config = read_config(options.config, options.set)
    world = distributed.start(options.device)
    sampler, epoch, settings = make_sampler(config, options, world)
    folder = Path(config.save_dir) / folder_name(epoch, config.model_type, options.mode, settings["steps"], options.eta)
    count = options.images or BATCH * options.batches

    def claim() -> bool:
        """Make the folder ready; return whether everything is there already."""
        held.enter_context(taken(folder))
        sampling.claim(folder, settings, options.overwrite)
        return sampling.is_complete(folder, count, options.npz)

    if distributed.on_main(claim, world):
        if world.main:
            print(f"complete: {folder}")
        return distributed.stop()
    if world.main:
        calls = sampler.diffusion.evaluations(options.mode, settings["steps"])
        print(f"{count} images to {folder}/pngs, {calls} network calls each, {settings['precision']} on {world.size} x "
              f"{world.device.type}", flush=True)

    # Every process makes and writes its own parts.
    parts = split_batches(range(count), options.batch, world.size)
    own, rows = parts[world.rank::world.size], sampler.rows(max(map(len, parts)), count)
    counter = Progress("generating", sum(map(len, own)), "img", shown=world.main)
    with PngWriter() as writer:
        for part in own:
            missing = [not png_path(folder, number).exists() for number in part]
            if any(missing):  # made as a whole: a repeated command computes the same batch
                images = to_uint8(sampler.images(part, rows)).expand(-1, 3, -1, -1).cpu().numpy()  # gray ones as RGB
                writer.save((png_path(folder, number), image)
                            for number, image, new in zip(part, images, missing, strict=True) if new)
            counter.advance(len(part))
    counter.close()
    distributed.barrier(world)
    if world.main:
        sampling.write_sheets(folder, count)
        if options.npz:
            print(f"saved {sampling.write_archive(folder, count)}")
        print("Done.")
    distributed.stop()


def make_sampler(config: Config, options: SimpleNamespace, world: World) -> tuple[ImageSampler, int, dict[str, Any]]:
    """Return the sampler of the flags, the epoch, and the settings of the images."""
    kind, extra = config.model_type, {"clip": not options.no_clip}
    if kind == "DDPM":
        extra["exact_end"] = options.exact_end
    precision = choose_precision(options, world.device)
    set_arithmetic(options.strict, tf32=precision != "fp32")

    def find() -> tuple[Path, int, str]:
        path, epoch = find_checkpoint(config, options.epoch)
        return path, epoch, snapshots.digest(path)

    path, epoch, digest = distributed.on_main(find, world)
    own: list = []  # the main process goes first: it alone reports a file that does not fit
    distributed.on_main(lambda: own.append(load_model(config, epoch, world.device, **extra)), world)
    net, diffusion = own[0] if own else load_model(config, epoch, world.device, **extra)
    if net.image_shape[0] not in (1, 3):
        raise UserError(f"{config.source}: a PNG holds 1 or 3 channels, not {net.image_shape[0]}")
    steps = options.steps or diffusion.default_steps()
    if kind == "EDM" or options.mode == "DDIM":
        # Told now, not after the first batch.
        diffusion.schedule(steps) if kind == "EDM" else diffusion.ddim_times(steps)
    if world.main:
        print(f"loading model at {path}")
    sampler = ImageSampler(net, diffusion, mode=options.mode, steps=steps, eta=options.eta, precision=precision,
                           seed=options.seed, fast=not options.strict, compile=options.compile)
    settings = dict(checkpoint=digest, epoch=epoch, model_type=kind, mode=options.mode, steps=steps, eta=options.eta,
                    seed=options.seed, precision=precision, device=world.device.type, strict=options.strict, **extra)
    return sampler, epoch, settings


if __name__ == "__main__":
    run_main(main)
