"""Linear probe of a DiT trained on ImageNet 256x256, on CIFAR-10 or Tiny-ImageNet latents.

    python linear.py --dataset cifar --use_amp
    torchrun --standalone --nproc_per_node=4 linear.py --dataset tiny --use_amp
    python linear.py --name layer-12,layer-13,layer-14 --time 81,121,161     # nine probes in one run

The latents come from vae_preprocessing.py, the weights from pretrained_models/DiT-XL-2-256x256.pt. A feature is the
mean over tokens of one block's output for a noised latent without class; later blocks do not run.
The same command again continues.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from DDAE.ddae.config import choose_precision
from DDAE.ddae.data import item_noise
from DDAE.ddae.model import check_names
from DDAE.ddae.probe import Examples, LinearHeads, test_heads, train_heads, write_probes
from DDAE.DiT.latents import DIT, Latents, code_folder, read_latents
from DDAE.DiT.network import DiT, latent_features, load_dit
from shared import cli, distributed
from shared.cli import Float, Int, IntList, Option, Text, less_memory, run_main
from shared.data.cache import rank_part
from shared.distributed import World
from shared.training.fingerprint import fingerprints
from shared.training.log import Log
from shared.training.precision import autocast, to_device
from shared.training.progress import progress
from shared.training.randomness import numpy_rng, torch_rng
from shared.training.run import Run

STEPS = 1000
LEVEL = {"tiny": 81}        # 121 for all others
FLAGS = (
    *DIT,
    Option("--batch_size", Int(1), 128, "batch of the training", unit="images per process"),
    Option("--lr", Float(0, open=True), 1e-3, "learning rate of one process; multiplied by their number"),
    Option("--epoch", Int(1), 30, "epochs of training"),
    Option("--time", IntList(high=STEPS - 1), None, "noise level, or several: 81,121", default_help="121; tiny: 81"),
    Option("--name", Text, "layer-13", "block from layer-0 on, or several: layer-9,layer-13"),
    Option("--num_copies", Int(1), None, "augmented copies to use", default_help="all"),
    Option("--ckpt", Text, "pretrained_models/DiT-XL-2-256x256.pt", "weights: a state dict, or a dict with the entry "
           "ema", metavar="FILE"),
    Option("--model", Text, "DiT-XL/2", "DiT-{XL,L,B,S}/{2,4,8}"),
    Option("--outdir", Text, "linear_probe", "folder of the results, with a sub-folder per data set", metavar="DIR"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    options = cli.parse(__doc__, FLAGS, argv)
    usual = LEVEL.get(options.dataset, 121)
    options.names = options.name.split(",")
    # A negative level is the published way to ask for the usual one.
    options.times = [usual if time < 0 else time for time in options.time or [usual]]
    return options


@less_memory("--batch_size")
def main() -> None:
    options = parse()
    world = distributed.start(options.device)
    options.precision = choose_precision(options, world.device)
    folder = code_folder(options)
    train, test = read_latents(folder, "train", options.num_copies), read_latents(folder, "test")
    net = load_dit(options.ckpt, options.model, train.copies[0].shape[-1], world.device)
    check_names(options.names, net.block_names)

    keys = {f"{time}/{name}": net.width for time in options.times for name in options.names}
    heads = LinearHeads(keys, int(train.labels.max()) + 1, options.seed).to(world.device)
    optimizer = torch.optim.Adam(heads.parameters())
    size, lr = options.batch_size * world.size, options.lr * world.size
    config = {"dataset": options.dataset, "probes": list(keys), "batch": size, "lr": lr, "epochs": options.epoch,
              "model": options.model, "ckpt": Path(options.ckpt).name, "seed": options.seed,
              "copies": len(train.copies), "precision": options.precision}
    inputs = distributed.on_main(lambda: fingerprints({"--ckpt": options.ckpt, "--codes": folder}), world)
    outdir = Path(options.outdir) / folder.name
    log = Log(outdir, world, image_batch=size, desc="linear probe")
    run = Run(outdir, config, dict(heads=heads, optimizer=optimizer), world, log=log, overwrite=True, inputs=inputs)
    if not run.finished:
        log.print(f"{options.model}: {', '.join(keys)} on {len(train)} latents of {len(train.copies)} copies; "
                  f"{world.size} process(es) on {world.device.type}")
    examples = random_copies(net, train, size, options, world)
    train_heads(run, heads, optimizer, examples, options.epoch, -(-len(train) // size), lr)
    accuracies = test_heads(heads, test_examples(net, test, options, world), world)
    for key, accuracy in accuracies.items():
        log.print(f"{'' if len(accuracies) == 1 else f'[key {key}]: '}Test acc: {100 * accuracy:.2f}")
    if world.main:
        write_probes(run, heads, accuracies, next(iter(accuracies)))
    distributed.stop()


def random_copies(net: DiT, latents: Latents, size: int, options: SimpleNamespace, world: World) -> Examples:
    """Return the features by training step: each latent from a copy drawn at random, with fresh noise."""
    seed, count, device = options.seed, len(latents), world.device

    def examples(step: int) -> tuple[dict[str, Tensor], Tensor, float]:
        epoch, place = divmod(step, -(-count // size))
        items = numpy_rng(seed, epoch, "order").permutation(count)[place * size:(place + 1) * size]
        copies = numpy_rng(seed, step, "copies").integers(len(latents.copies), size=len(items))
        part = rank_part(len(items), world)
        codes = to_device(latents.take(copies[part], items[part]), device)

        def noise(time: int) -> Tensor:
            rng = torch_rng(seed, step, f"noise {time}", device)
            return torch.randn(len(items), *codes.shape[1:], generator=rng, device=device)[part]

        labels = to_device(latents.labels[items[part]], device)
        return probe_features(net, codes, noise, options), labels, len(codes) / len(items)

    return examples


def test_examples(net: DiT, latents: Latents, options: SimpleNamespace, world: World
                  ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield (features, labels) of this rank's items; their noise depends on the item alone."""
    part = rank_part(len(latents), world)
    for start in progress(range(part.start, part.stop, options.batch_size), "test", unit="batches", shown=world.main):
        items = np.arange(start, min(start + options.batch_size, part.stop))
        codes = to_device(latents.take(np.zeros_like(items), items), world.device)
        noise = item_noise(options.seed, items, codes.shape[1:], "test noise").to(world.device)
        labels = to_device(latents.labels[items], world.device)
        yield probe_features(net, codes, lambda time, noise=noise: noise, options), labels


def probe_features(net: DiT, codes: Tensor, noise: Callable[[int], Tensor], options: SimpleNamespace
                   ) -> dict[str, Tensor]:
    """Return "time/block" -> float32 [n, width], one pass per noise level; noise: level -> [n, C, S, S]."""
    with torch.no_grad(), autocast(codes.device, options.precision):
        return {f"{time}/{name}": value for time in options.times
                for name, value in latent_features(net, codes, time, options.names, noise(time)).items()}


if __name__ == "__main__":
    run_main(main)
