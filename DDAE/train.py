"""Pre-train a denoising diffusion autoencoder: DDPM or EDM, without labels.

    python train.py --config config/DDPM_ddpm.yaml --use_amp
    torchrun --standalone --nproc_per_node=4 train.py --config config/DDPM_ddpm.yaml --use_amp

The same command again continues a run that was interrupted.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from DDAE.ddae.config import COMMON, FAST, GPUS, choose_precision, make_diffusion, make_network, read_config
from DDAE.ddae.data import TrainBatches, check_fits, load_images
from DDAE.ddae.model import AttentionBlock
from DDAE.ddae.training import train
from shared import cli, distributed
from shared.cli import Flag, Float, Int, Option, less_memory, run_main
from shared.training.fingerprint import fingerprints
from shared.training.precision import set_arithmetic

FLAGS = (
    *COMMON, GPUS, *FAST,
    Option("--constant_ema", Flag, False, "use the config's ema from the start, without the published warm-up"),
    Option("--steps", Int(1), None, "end after this number of steps, with a checkpoint of the epoch reached"),
    Option("--checkpoint_seconds", Float(0, open=True), 600.0, "time between two checkpoints", unit="s"),
    Option("--overwrite", Flag, False, "move another run in save_dir aside and start anew (without it: an error)"),
    Option("--log_every", Int(1), 50, "steps between two lines of the log"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


@less_memory("batch_size of the config (--set batch_size=N)")
def main() -> None:
    options = parse()
    config = read_config(options.config, options.set)
    world = distributed.start(options.device)
    gpus, seed = options.gpus or world.size, options.seed
    precision = choose_precision(options, world.device)
    set_arithmetic(options.strict, tf32=precision != "fp32")
    if world.main:
        print(f"local_rank = {world.local_rank}, seed = {seed}")
        print(f"Using DDP, lr = {config.lrate:f} * {gpus}")

    def check() -> dict[str, str]:
        with torch.device("meta"):
            shape = make_network(config).image_shape
        make_diffusion(config)
        images = load_images(config.dataset, "train", options.data_dir)
        check_fits(images, shape, config.classes)
        return fingerprints({"dataset": images})

    inputs = distributed.on_main(check, world)  # decodes the images, too; the other processes read the cached ones
    images = load_images(config.dataset, "train", options.data_dir)
    batches = TrainBatches(images, config.batch_size * gpus, world, seed, flip=config.flip, pad=0)
    torch.manual_seed(seed)
    net = make_network(config)
    if world.main:
        for layer in net.modules():
            if isinstance(layer, AttentionBlock):
                print(f"{layer.heads} heads, {layer.d_k} channels per head")
        print(f"nn model # params: {sum(p.numel() for p in net.parameters()) / 1e6:.1f}")
        print(f"{len(images)} images, {batches.per_epoch} steps of {batches.size} an epoch, {precision} on "
              f"{world.size} x {world.device.type}")
    train(config, net, batches, world, gpus=gpus, precision=precision, strict=options.strict, compile=options.compile,
          seed=seed, constant_ema=options.constant_ema, steps=options.steps,
          checkpoint_seconds=options.checkpoint_seconds, log_every=options.log_every, inputs=inputs,
          overwrite=options.overwrite)
    distributed.stop()


if __name__ == "__main__":
    run_main(main)
