"""Alignment and uniformity of the features of a run's checkpoints: how they develop while a DDAE is trained.

    python contrastive.py --config config/DDPM_ddpm.yaml --use_amp
    python contrastive.py --config config/DDPM_ddpm.yaml --epochs 100,400,800

Alignment: how far apart the features of one image under two draws of the noise are, the lower the better. Uniformity:
how evenly the features of all images spread over the sphere, the lower the better (arXiv 2005.10242). Both are means
over batches, and uniformity depends on their size. The same command again computes only what is missing.
"""
from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from DDAE.ddae.checkpoints import find_checkpoint, saved_epochs
from DDAE.ddae.config import COMMON, GPUS, Config, read_config
from DDAE.ddae.data import TestItems
from DDAE.ddae.probe import Encoder, load_encoder, load_split
from shared import cli, distributed
from shared.cli import Int, IntList, Option, Text, run_main
from shared.data.images import ImageSet
from shared.distributed import World
from shared.report.plots import Panel, curves
from shared.training.files import make_dir, write_json
from shared.training.precision import computed_on
from shared.training.progress import progress

BATCH = 128     # per process
FLAGS = (
    *COMMON, GPUS,
    Option("--epoch_interval", Int(1), 400, "measure a checkpoint at this interval, and the last one", unit="epochs"),
    Option("--epochs", IntList(-1), None, "these checkpoints instead", metavar="N,N,..."),
    Option("--images", Int(2), None, "use the first N training images", default_help="all", metavar="N"),
    Option("--outdir", Text, None, "folder of the results", default_help="{save_dir}/contrastive", metavar="DIR"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    """Return the mean of ||x_i - y_i||^alpha over positive pairs. x, y: [..., N, D], l2-normalised -> [...]."""
    return (x - y).norm(dim=-1).pow(alpha).mean(-1)


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Return log mean exp(-t ||x_i - x_j||^2) over all pairs i < j. x: [..., N, D], N >= 2 -> [...].

    Squared distances come from one Gram matrix: the work is a matrix product on the device of x.
    """
    count = x.shape[-2]
    square = x.square().sum(-1)
    distance = (square[..., :, None] + square[..., None, :] - 2 * x @ x.mT).clamp(min=0)
    rows, columns = torch.triu_indices(count, count, offset=1, device=x.device)
    return (-t * distance[..., rows, columns]).logsumexp(-1) - math.log(len(rows))


def main() -> None:
    options = parse()
    config = read_config(options.config, options.set)
    epochs = checkpoints(config, options)
    world = distributed.start(options.device)
    size = BATCH * (options.gpus or world.size)
    out = make_dir(options.outdir or Path(config.save_dir) / "contrastive")
    done = distributed.broadcast_value(read_results(out) if world.main else None, world)
    results: dict[int, dict[str, Any]] = {}
    for epoch in epochs:
        encoder = load_encoder(options, world.device, epoch)
        images = load_split(encoder, "train", options)
        images = images.subset(slice(options.images)) if options.images else images
        level = encoder.probe.timestep
        about = {"level": level, "batch": min(size, len(images)), "images": len(images), "seed": options.seed,
                 "precision": encoder.precision, "inputs": encoder.inputs(images, world)}
        known = done.get(str(epoch), {})
        if known.get("about") != about:
            known = {"about": about, **measure(encoder, images, level, size, options.seed, world, f"epoch {epoch}")}
            done[str(epoch)] = known
            if world.main:
                write_json(out / "result.json", {"epochs": done, **computed_on(world.device)})
        results[epoch] = known
    if world.main:
        report(results, out, size)
    distributed.stop()


def checkpoints(config: Config, options: SimpleNamespace) -> list[int]:
    """Return the epochs to measure. UserError if a named one, or all of the interval, are missing."""
    if options.epochs is not None:
        return [find_checkpoint(config, epoch)[1] for epoch in options.epochs]
    wanted = list(range(options.epoch_interval, config.n_epoch, options.epoch_interval))
    wanted = list(dict.fromkeys([*wanted, config.n_epoch - 1]))
    saved = saved_epochs(config)
    missing = [epoch for epoch in wanted if epoch not in saved]
    if missing == wanted:
        find_checkpoint(config, wanted[0])  # says which there are
    if missing:
        warnings.warn(f"there are no checkpoints of the epochs {', '.join(map(str, missing))}; they are left out",
                      stacklevel=2)
    return [epoch for epoch in wanted if epoch in saved]


def measure(encoder: Encoder, images: ImageSet, level: int, size: int, seed: int, world: World, desc: str
            ) -> dict[str, dict[str, float]]:
    """Return {"align": block -> mean, "uniform": block -> mean} of normalised features under two draws of the noise.

    Batches of `size` are dealt to the ranks whole, so the numbers do not depend on how many ranks there are.
    """
    names = list(encoder.widths)
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=world.device)
    # Every rank looks at the whole set as if alone, and takes its batches out.
    items = TestItems(images, size, World(device=world.device), seed)
    for number, batch in progress(enumerate(items), desc, len(items.starts), "batches", shown=world.main):
        if number % world.size != world.rank:
            continue
        pairs: dict[str, list[Tensor]] = {name: [] for name in names}
        for start in range(0, len(batch.items), BATCH):
            part = batch.slice(start, start + BATCH)
            noise = torch.cat([items.noise(part, f"pair {draw}") for draw in (0, 1)])
            found = encoder.features(torch.cat([part.images] * 2), level, noise, names, norm=True)
            for name, value in found.items():
                pairs[name].append(value.view(2, len(part.items), -1))
        for place, name in enumerate(names):
            both = torch.cat(pairs[name], dim=1)
            uniform = uniformity(both).mean() if both.shape[1] > 1 else both.new_zeros(())
            sums[place] += len(batch.items) * torch.stack([alignment(*both), uniform]).double()
    align, uniform = (distributed.all_sum(sums, world) / len(images)).T.tolist()
    return {"align": dict(zip(names, align, strict=True)), "uniform": dict(zip(names, uniform, strict=True))}


def read_results(out: Path) -> dict[str, Any]:
    """Return the entries of result.json by epoch; {} without one."""
    try:
        return json.loads((out / "result.json").read_text(encoding="utf-8"))["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def report(results: dict[int, dict[str, Any]], out: Path, size: int) -> None:
    """Print the lists over checkpoints block by block, and draw them."""
    epochs, panels = list(results), {}
    print(f"checkpoints {epochs}, batches of {size}")
    for title, key in (("align metric", "align"), ("uniform metric", "uniform")):
        print(f"{title}:")
        lines = {name: (epochs, [results[epoch][key][name] for epoch in epochs]) for name in results[epochs[0]][key]}
        panels[title] = Panel(lines, "epoch", f"{title} (lower is better)")
        for name, (_, values) in lines.items():
            print(f"'{name}': [{', '.join(formatted(values))}]")
    panels["first and last checkpoint, a point a block"] = Panel(
        {f"epoch {epoch}": (list(results[epoch]["align"].values()), list(results[epoch]["uniform"].values()))
         for epoch in (epochs[0], epochs[-1])}, "align metric", "uniform metric")
    curves(panels, out / "curves.png")
    print(f"result.json and curves.png are in {out}")


def formatted(values: Sequence[float]) -> list[str]:
    """Return the numbers with four decimals, the published form."""
    return [f"{value:.4f}" for value in values]


if __name__ == "__main__":
    run_main(main)
