"""Generate images with a pre-trained DDAE, as PNG files.

    python sample.py --config config/DDPM_ddpm.yaml --use_amp --epoch 400
    torchrun --standalone --nproc_per_node=4 sample.py --config config/DDPM_ddpm.yaml --use_amp --epoch 400 --mode DDPM

The same command again makes only what is missing.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from DDAE.ddae.options import choose_precision, ddae_parser
from shared.cli import Parser, UserError, run_main
from shared.training.precision import set_arithmetic

if TYPE_CHECKING:
    from DDAE.ddae.config import Config
    from DDAE.ddae.sampling import ImageSampler
    from shared.distributed import World


def add_sampler_flags(parser: Parser) -> None:
    """Add the flags that decide which image a number stands for."""
    parser.add_argument("--epoch", type=int, default=-1, help="checkpoint [the last epoch of the config]")
    parser.add_argument("--mode", choices=("DDPM", "DDIM"), default="DDIM", help="sampler; no matter for EDM [DDIM]")
    parser.add_argument("--steps", type=int, help="sampler steps [100; EDM 18]; no matter for --mode DDPM")
    parser.add_argument("--eta", type=float, default=0.0, help="stochasticity [0.0]")
    parser.add_argument("--no_clip", action="store_true", help="do not clip predicted images to [-1, 1]")
    parser.add_argument("--exact_end", action="store_true", help="DDIM with the schedule of training, which ends free "
                        "of noise; the published one leaves about 1 %%")
    parser.add_argument("--batch", type=int, default=100, help="most images of a process at once [100]")
    parser.add_argument("--compile", action="store_true", help="compile the network: slow to start, then faster")
    parser.add_argument("--strict", action="store_true", help="the published arithmetic: fp32 and no fast path")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ddae_parser(__doc__)
    add_sampler_flags(parser)
    parser.add_argument("--batches", type=int, default=125, help="number of images in 400s [125]")
    parser.add_argument("--images", type=int, help="number of images, in place of --batches")
    parser.add_argument("--npz", action="store_true", help="also write all images into one .npz beside the folder")
    parser.add_argument("--overwrite", action="store_true", help="make images anew that are there already")
    args = parser.parse_args(argv)
    check(args, "batches", "images")
    return args


def check(args: argparse.Namespace, *counts: str) -> None:
    """Raise UserError for flags out of range or in contradiction."""
    for name in ("steps", "batch", *counts):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if not 0 <= args.eta:
        raise UserError(f"--eta: expected at least 0, got {args.eta}")
    if args.epoch < -1:
        raise UserError(f"--epoch: expected an epoch from 0 on, or -1 for the last one, got {args.epoch}")
    if args.strict and (args.use_amp or args.compile or args.precision not in (None, "fp32")):
        raise UserError("--strict means fp32 and no compilation; leave out --use_amp, --precision and --compile")


def main() -> None:
    args = parse()
    from DDAE.ddae.config import read_config

    config = read_config(args.config, args.set)

    from shared import distributed

    world = distributed.start(args.device)
    generate(config, args, world)
    distributed.stop()


def make_sampler(config: Config, args: argparse.Namespace, world: World) -> tuple[ImageSampler, int, dict[str, Any]]:
    """Return the sampler of checked flags, the epoch, and all that the images depend on."""
    from DDAE.ddae.checkpoints import find_checkpoint, load_model
    from DDAE.ddae.sample_folder import digest
    from DDAE.ddae.sampling import ImageSampler
    from shared.distributed import on_main

    options: dict[str, Any] = {"clip": not args.no_clip}
    if config.model_type == "DDPM":
        options["exact_end"] = args.exact_end
    path, epoch, sha256 = on_main(lambda: (*find_checkpoint(config, args.epoch),
                                           digest(find_checkpoint(config, args.epoch)[0])), world)
    own = []  # the main process goes first: it alone reports a file that does not fit
    on_main(lambda: own.append(load_model(config, epoch, world.device, **options)), world)
    net, diffusion = own[0] if own else load_model(config, epoch, world.device, **options)
    if world.main:
        print(f"loading model at {path}")
    if net.image_shape[0] not in (1, 3):
        raise UserError(f"{config.source}: a PNG holds 1 or 3 channels, not {net.image_shape[0]}")
    precision = choose_precision(args, world.device)
    set_arithmetic(args.strict, tf32=precision != "fp32")
    steps = args.steps or diffusion.default_steps()
    if config.model_type == "EDM" or args.mode == "DDIM":
        # Told now, not after the first batch.
        diffusion.schedule(steps) if config.model_type == "EDM" else diffusion.ddim_times(steps)
    sampler = ImageSampler(net, diffusion, mode=args.mode, steps=steps, eta=args.eta, precision=precision,
                           seed=args.seed, fast=not args.strict, compile=args.compile)
    settings = dict(checkpoint=sha256, epoch=epoch, model_type=config.model_type, mode=args.mode, steps=steps,
                    eta=args.eta, seed=args.seed, precision=precision, device=world.device.type,
                    strict=args.strict, **options)
    return sampler, epoch, settings


def generate(config: Config, args: argparse.Namespace, world: World) -> None:
    """Make the images of checked flags, on all processes of the world, each writing its own."""
    from DDAE.ddae import sample_folder as files
    from DDAE.ddae.pictures import to_uint8
    from shared import distributed
    from shared.data.pngs import PngWriter
    from shared.training.progress import Progress
    from shared.training.seeds import split_batches

    sampler, epoch, settings = make_sampler(config, args, world)
    folder = Path(config.save_dir) / files.folder_name(epoch, config.model_type, args.mode, settings["steps"], args.eta)
    count = args.images or files.BATCH * args.batches
    distributed.on_main(lambda: files.claim(folder, settings, args.overwrite), world)
    if world.main:
        calls = sampler.diffusion.evaluations(args.mode, settings["steps"])
        print(f"{count} images to {folder}/pngs, {calls} network calls each, {settings['precision']} on {world.size} x "
              f"{world.device.type}", flush=True)

    parts = split_batches(range(count), args.batch, world.size)
    own, rows = parts[world.rank::world.size], sampler.rows(max(map(len, parts)), count)
    counter = Progress("generating", sum(map(len, own)), "img", shown=world.main)
    with PngWriter() as writer:
        for part in own:
            missing = [not files.png_path(folder, number).exists() for number in part]
            if any(missing):  # made as a whole, so that a repeated command computes the very same batch
                images = to_uint8(sampler.images(part, rows)).cpu().numpy()
                writer.save((files.png_path(folder, number), image)
                            for number, image, new in zip(part, images, missing, strict=True) if new)
            counter.advance(len(part))
    counter.close()
    distributed.barrier(world)
    if world.main:
        files.write_sheets(folder, count)
        if args.npz:
            print(f"saved {files.write_archive(folder, count)}")
        print("Done.")


if __name__ == "__main__":
    run_main(main)
