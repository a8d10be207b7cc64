"""A grid search over blocks and noise levels: linear.py --grid against one probe after another.

    python -m tests.bench.ddae_grid [--images 64] [--channels 128]

One epoch on random images with the 35.7M network: all 12 blocks at three levels in one run, and 36 runs of one block
and level each. Two references: the published way, in which every probe runs the whole network, and our single probes,
whose passes end at their block. Both are timed on a few probes and counted for all of them. Exit status 1 where the
first ratio is below the bar, or heads differ.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from DDAE.ddae.data import TrainBatches
from DDAE.ddae.diffusion import DDPM
from DDAE.ddae.model import UNet, use_channels_last
from DDAE.ddae.probe import LinearHeads, heads_loss
from shared.data.images import ImageSet
from shared.distributed import World

BAR = 8.0
LEVELS = (1, 11, 21)
SEED = 0


def timed(work: Callable[[], LinearHeads]) -> tuple[LinearHeads, float]:
    start = time.perf_counter()
    heads = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return heads, time.perf_counter() - start


def probe(net: UNet, diffusion: DDPM, batches: TrainBatches, levels: Sequence[int], names: Sequence[str],
          whole: bool = False) -> LinearHeads:
    """Train heads on the blocks at the levels for one epoch; `whole`: let the network run to its end."""
    device = next(net.parameters()).device
    heads = LinearHeads({f"{level}/{name}": net.widths[name] for level in levels for name in names}, 10, SEED)
    heads.to(device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-3)
    for step in range(batches.per_epoch):
        batch, features = batches(step), {}
        for level in levels:
            with torch.no_grad():
                noise = batch.noise(SEED, step, f"noise {level}")
                if whole:
                    x, t = diffusion.perturb(2 * batch.images - 1, level, noise)
                    found = {name: value.float().mean((2, 3)) for name, value in net(x, t, None, True)[1].items()}
                else:
                    found = diffusion.features(net, batch.images, level, noise, names)
            features |= {f"{level}/{name}": found[name] for name in names}
        loss = heads_loss(heads(features), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=128)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = UNet(n_channels=args.channels).eval().requires_grad_(False).to(device)
    use_channels_last(net)
    diffusion = DDPM((1e-4, 0.02), 1000)
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (args.images, 3, 32, 32), dtype=np.uint8),
                      rng.integers(0, 10, args.images), tuple("0123456789"), "random")
    batches = TrainBatches(images, args.batch, World(device=device), SEED)
    names = net.block_names
    probe(net, diffusion, batches, LEVELS[:1], names)  # warms up
    together, grid = timed(lambda: probe(net, diffusion, batches, LEVELS, names))
    # The first, the middle and the last block stand for all: passes become longer evenly.
    chosen = [names[0], names[len(names) // 2], names[-1]]
    singles = {name: timed(lambda name=name: probe(net, diffusion, batches, LEVELS[1:2], [name])) for name in chosen}
    _, whole = timed(lambda: probe(net, diffusion, batches, LEVELS[1:2], names[:1], whole=True))
    count = len(LEVELS) * len(names)
    published, truncated = count * whole, count * float(np.mean([seconds for _, seconds in singles.values()]))
    print(f"{args.images} images on {device.type}: grid of {count} probes {grid:.2f} s")
    print(f"one after another, whole network: {published:.1f} s, {published / grid:.1f} times as long (bar {BAR:g})")
    print(f"one after another, ended at the block: {truncated:.1f} s, {truncated / grid:.1f} times as long")
    apart = max(float((ours - alone).abs().max()) for name, (heads, _) in singles.items()
                for ours, alone in zip(together.head(f"{LEVELS[1]}/{name}"), heads.head(f"{LEVELS[1]}/{name}"),
                                       strict=True))
    print(f"weights of a head in the grid and alone are at most {apart:.1e} apart")
    return 0 if published / grid >= BAR and apart < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
