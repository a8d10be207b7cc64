"""Pre-train a denoising diffusion autoencoder: DDPM or EDM, without labels.

    python train.py --config config/DDPM_ddpm.yaml --use_amp
    torchrun --standalone --nproc_per_node=4 train.py --config config/DDPM_ddpm.yaml --use_amp

The same command again continues a run that was interrupted.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from DDAE.ddae.options import choose_precision, ddae_parser
from shared.cli import UserError, run_main
from shared.training.precision import set_arithmetic

if TYPE_CHECKING:
    from DDAE.ddae.config import Config
    from shared.distributed import World


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ddae_parser(__doc__)
    parser.add_argument("--gpus", type=int, help="processes that the config's batch_size and lrate are meant for, "
                        "however many there are [as many as there are]")
    parser.add_argument("--compile", action="store_true", help="compile the network: slow to start, then faster")
    parser.add_argument("--strict", action="store_true", help="the published arithmetic: fp32 and no fast path")
    parser.add_argument("--constant_ema", action="store_true", help="use the config's ema from the start, without the "
                        "published warm-up")
    parser.add_argument("--steps", type=int, help="end after so many steps, with a "
                        "checkpoint of the epoch they reach, to try things out")
    parser.add_argument("--checkpoint_seconds", type=float, default=600.0,
                        help="time between two checkpoints to continue from [600]")
    parser.add_argument("--log_every", type=int, default=50, help="steps between two lines of the log [50]")
    args = parser.parse_args(argv)
    for name in ("gpus", "steps", "checkpoint_seconds", "log_every"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name}: expected a number above 0, got {value}")
    if args.strict and (args.use_amp or args.compile or args.precision not in (None, "fp32")):
        raise UserError("--strict means fp32 and no compilation; leave out --use_amp, --precision and --compile")
    return args


def main() -> None:
    args = parse()
    from DDAE.ddae.config import read_config

    config = read_config(args.config, args.set)

    from shared import distributed

    start(config, args, distributed.start(args.device))
    distributed.stop()


def start(config: Config, args: argparse.Namespace, world: World) -> None:
    """Prepare data and network of checked flags, and train."""
    import torch

    from DDAE.ddae.batches import TrainBatches
    from DDAE.ddae.config import make_diffusion, make_network
    from DDAE.ddae.data import check_fits, load_images
    from DDAE.ddae.training import Settings, describe, train
    from shared.distributed import on_main
    from shared.training.files import lock

    gpus = args.gpus or world.size
    precision = choose_precision(args, world.device)
    set_arithmetic(args.strict, tf32=precision != "fp32")
    say = print if world.main else (lambda text: None)
    say(f"local_rank = {world.local_rank}, seed = {args.seed}")
    say(f"Using DDP, lr = {config.lrate:f} * {gpus}")

    def check() -> None:
        with torch.device("meta"):
            shape = make_network(config).image_shape
        make_diffusion(config)
        check_fits(load_images(config.dataset, "train", args.data_dir), shape, config.classes)

    on_main(check, world)  # decodes the images as well; the other processes then read what was cached
    held = []  # while this process lives, no other one trains in the folder
    on_main(lambda: held.append(lock(config.save_dir)), world)
    images = load_images(config.dataset, "train", args.data_dir)
    batches = TrainBatches(images, config.batch_size * gpus, world, args.seed, flip=config.flip, pad=0)
    torch.manual_seed(args.seed)
    net = make_network(config)
    describe(net, say)
    say(f"{len(images)} images, {batches.per_epoch} steps of {config.batch_size * gpus} an epoch, {precision} on "
        f"{world.size} x {world.device.type}")
    train(config, net, batches, world, Settings(
        gpus=gpus, precision=precision, strict=args.strict, compile=args.compile, seed=args.seed,
        constant_ema=args.constant_ema, steps=args.steps, checkpoint_seconds=args.checkpoint_seconds,
        log_every=args.log_every))
    for file in held:
        file.close()


if __name__ == "__main__":
    run_main(main)
