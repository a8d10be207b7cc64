"""Alignment and uniformity of the features of a run's checkpoints: how they develop while a DDAE is trained.

    python contrastive.py --config config/DDPM_ddpm.yaml --use_amp
    python contrastive.py --config config/DDPM_ddpm.yaml --epochs 100,400,800

Alignment: how far apart the features of one image under two draws of the noise are, the lower the better. Uniformity:
how evenly the features of all images spread over the sphere, the lower the better (arXiv 2005.10242). Both are means
over batches, and uniformity depends on their size. The same command again computes only what is missing.
"""
from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from DDAE.ddae.encoder import Encoder, encoder_parser, load_encoder, load_split
from shared.cli import UserError, run_main
from shared.lazy import lazy

if TYPE_CHECKING:
    from DDAE.ddae.config import Config
    from shared.data.images import ImageSet
    from shared.distributed import World

torch = lazy("torch")

BATCH = 128     # per process
ALPHA, T = 2, 2


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = encoder_parser(__doc__, epoch=False)
    parser.add_argument("--epoch_interval", type=int, default=400, help="checkpoints of every so many epochs and the "
                        "last [400]")
    parser.add_argument("--epochs", default=None, metavar="N,N,...", help="these checkpoints instead")
    parser.add_argument("--images", type=int, default=None, metavar="N", help="use the first N training images [all]")
    parser.add_argument("--outdir", default=None, metavar="DIR", help="results [{save_dir}/contrastive]")
    options = parser.parse_args(argv)
    if options.epoch_interval < 1 or (options.images is not None and options.images < 2):
        raise UserError("--epoch_interval must be at least 1, --images at least 2")
    try:
        options.chosen = None if options.epochs is None else [int(part) for part in options.epochs.split(",")]
    except ValueError:
        raise UserError(f"--epochs {options.epochs}: expected whole numbers separated by commas") from None
    return options


def main() -> None:
    options = parse()
    from DDAE.ddae.config import read_config
    from shared import distributed
    from shared.training.files import make_dir
    from shared.training.hardware import computed_on

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
                 "precision": encoder.precision, "weights": encoder.facts()}
        known = done.get(str(epoch), {})
        if known.get("about") != about:
            known = {"about": about, **measure(encoder, images, level, size, options.seed, world, f"epoch {epoch}")}
            done[str(epoch)] = known
            if world.main:
                write_results(out, done, computed_on(world.device))
        results[epoch] = known
    if world.main:
        report(config, results, out, size)
    distributed.stop()


def checkpoints(config: Config, options: argparse.Namespace) -> list[int]:
    """Return the epochs to measure. UserError where one that was named, or all of the interval, are missing."""
    from DDAE.ddae.checkpoints import find_checkpoint, saved_epochs

    if options.chosen is not None:
        return [find_checkpoint(config, epoch)[1] for epoch in options.chosen]
    wanted = list(range(options.epoch_interval, config.n_epoch, options.epoch_interval))
    wanted = list(dict.fromkeys([*wanted, config.n_epoch - 1]))
    there = [epoch for epoch in wanted if epoch in saved_epochs(config)]
    if not there:
        find_checkpoint(config, wanted[0])  # says which there are
    if missing := [epoch for epoch in wanted if epoch not in there]:
        warnings.warn(f"there are no checkpoints of the epochs {', '.join(map(str, missing))}; they are left out",
                      stacklevel=2)
    return there


def measure(encoder: Encoder, images: ImageSet, level: int, size: int, seed: int, world: World, desc: str
            ) -> dict[str, dict[str, float]]:
    """Return {"align": block -> mean, "uniform": block -> mean} of normalised features under two draws of the noise.

    Batches of `size` are dealt to the ranks whole, so the numbers do not depend on how many ranks there are.
    """
    from DDAE.ddae.batches import TestItems
    from DDAE.ddae.metrics import alignment, uniformity
    from shared import distributed
    from shared.distributed import World
    from shared.training.progress import progress

    names = list(encoder.widths)
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=world.device)
    # Every rank looks at the whole set as if alone, and takes its batches out.
    items = TestItems(images, size, World(device=world.device), seed)
    for number, batch in progress(enumerate(items), desc, len(items.starts), "batches", shown=world.main):
        if number % world.size != world.rank:
            continue
        pairs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for start in range(0, len(batch.items), BATCH):
            part = batch.slice(start, start + BATCH)
            noise = torch.cat([items.noise(part, f"pair {draw}") for draw in (0, 1)])
            found = encoder.features(torch.cat([part.images] * 2), level, noise, names, norm=True)
            for name, value in found.items():
                pairs[name].append(value.view(2, len(part.items), -1))
        for place, name in enumerate(names):
            both = torch.cat(pairs[name], dim=1)
            spread = uniformity(both, T).mean() if both.shape[1] > 1 else both.new_zeros(())
            sums[place] += len(batch.items) * torch.stack([alignment(*both, ALPHA), spread]).double()
    means = (distributed.sum_(sums, world) / len(images)).tolist()
    return {"align": dict(zip(names, (row[0] for row in means), strict=True)),
            "uniform": dict(zip(names, (row[1] for row in means), strict=True))}


def read_results(out: Path) -> dict[str, Any]:
    """Return what result.json has by epoch; {} without one."""
    try:
        return json.loads((out / "result.json").read_text(encoding="utf-8"))["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_results(out: Path, done: dict[str, Any], machine: dict[str, Any]) -> None:
    from shared.training.files import atomic

    with atomic(out / "result.json", "w") as file:
        json.dump({"epochs": done, **machine}, file, indent=1)


def report(config: Config, results: dict[int, dict[str, Any]], out: Path, size: int) -> None:
    """Print the lists over checkpoints block by block, and draw them."""
    from DDAE.ddae.heads import formatted
    from shared.report.plots import curves

    epochs, panels = list(results), {}
    print(f"checkpoints {epochs}, batches of {size}")
    for title, key in (("align metric:", "align"), ("uniform metric:", "uniform")):
        print(title)
        blocks = results[epochs[0]][key]
        for name in blocks:
            print(f"'{name}': [{', '.join(formatted([results[epoch][key][name] for epoch in epochs]))}]")
        panels[title.removesuffix(":")] = {name: (epochs, [results[e][key][name] for e in epochs]) for name in blocks}
    first, last = results[epochs[0]], results[epochs[-1]]
    panels["first and last checkpoint"] = {
        f"epoch {epoch}": (list(part["align"].values()), list(part["uniform"].values()))
        for epoch, part in ((epochs[0], first), (epochs[-1], last))}
    curves(panels, out / "curves.png", {"align metric": "epoch", "uniform metric": "epoch",
                                        "first and last checkpoint": "align metric (uniform metric: upwards)"})
    print(f"result.json and curves.png are in {out}")


if __name__ == "__main__":
    run_main(main)
