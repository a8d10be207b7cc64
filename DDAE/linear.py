"""Linear probe of frozen features: one noise level and block, or the whole grid of them in one run.

    python linear.py --config config/DDPM_ddpm.yaml --use_amp --epoch 400           # the config's level and block
    python linear.py --config config/DDPM_ddpm.yaml --use_amp --epoch 400 --grid    # all blocks at three levels
    python linear.py --config config/EDM_ddpmpp.yaml --epoch 1200 --times 1,2,3,4,6,8,10 --blocks out_5,out_6,out_7
    torchrun --standalone --nproc_per_node=4 linear.py --config ...

A feature is the mean over pixels of a decoder block's output for a noised image. The network runs once per batch and
level, up to the last block asked for; the heads of all blocks and levels are trained together, each as if alone. The
same command again continues.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from DDAE.ddae.encoder import ENCODERS, Encoder, encoder_parser, load_encoder, load_split
from shared.cli import UserError, run_main
from shared.lazy import lazy

if TYPE_CHECKING:
    from DDAE.ddae.batches import TestItems, TrainBatches
    from shared.training.run import Run

torch = lazy("torch")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = encoder_parser(__doc__)
    parser.add_argument("--grid", action="store_true", help="all blocks; levels 1, 11, 21 (DDPM) or 3, 4, 5 (EDM)")
    parser.add_argument("--times", default=None, metavar="N,N,...", help="noise levels, in place of the usual ones")
    parser.add_argument("--blocks", default=None, metavar="NAME,...", help="blocks, in place of the usual ones")
    parser.add_argument("--copies", type=int, default=0, metavar="N", help="compute the features of N augmented and "
                        "noised copies of the training set once, keep them on disk, and train on those; 0: fresh ones "
                        "in every epoch, as published [0]")
    parser.add_argument("--test_draws", type=int, default=1, metavar="N", help="average the logits of so many noise "
                        "draws per test image [1]")
    parser.add_argument("--encoder", choices=ENCODERS, default="trained", help="compare with fresh weights, or with "
                        "the pixels themselves [trained]")
    parser.add_argument("--outdir", default=None, metavar="DIR", help="results [{save_dir}/linear/...]")
    parser.add_argument("--steps", type=int, default=None, metavar="N", help="end after so many steps, without a test, "
                        "to see how long they take")
    options = parser.parse_args(argv)
    if options.copies < 0 or options.test_draws < 1 or (options.steps or 1) < 1:
        raise UserError("--copies must not be negative, --test_draws and --steps at least 1")
    try:
        options.levels = None if options.times is None else [int(part) for part in options.times.split(",")]
    except ValueError:
        raise UserError(f"--times {options.times}: expected whole numbers separated by commas") from None
    options.names = None if options.blocks is None else options.blocks.split(",")
    return options


def main() -> None:
    options = parse()
    from DDAE.ddae.batches import TestItems, TrainBatches
    from DDAE.ddae.heads import LinearHeads
    from DDAE.ddae.probe import test_heads, train_heads
    from shared import distributed
    from shared.training.log import Log
    from shared.training.run import Run

    world = distributed.start(options.device)
    encoder = load_encoder(options, world.device)
    levels, names = chosen(options, encoder)
    probe, seed = encoder.probe, options.seed
    train, test = load_split(encoder, "train", options), load_split(encoder, "test", options)

    keys = {f"{level}/{name}": encoder.widths[name] for level in levels for name in names}
    heads = LinearHeads(keys, encoder.config.classes, seed).to(world.device)
    optimizer = torch.optim.Adam(heads.parameters())
    gpus = options.gpus or world.size
    size, lr = probe.batch_size * gpus, probe.lrate * gpus
    batches = TrainBatches(train, size, world, seed, probe.flip, probe.pad)
    items = TestItems(test, probe.batch_size, world, seed)
    if options.copies:
        from DDAE.ddae.features import FeatureFiles

        files = FeatureFiles(encoder, options, world)
        examples = files.examples(batches, levels, names)
    else:
        examples = FreshExamples(encoder, batches, levels, names)

    config = {"probes": list(keys), "dataset": encoder.config.dataset, "encoder": encoder.name, "batch": size, "lr": lr,
              "epochs": probe.n_epoch, "flip": probe.flip, "pad": probe.pad, "seed": seed, "copies": options.copies,
              "precision": encoder.precision, "weights": encoder.facts()}
    kind = "grid" if options.grid or len(keys) > 1 else "_".join([str(levels[0]), names[0]])
    outdir = Path(options.outdir or Path(encoder.config.save_dir) / "linear" / f"{encoder.name}_{kind}")
    log = Log(outdir, world, image_batch=size, desc="linear probe")
    run = Run(outdir, config, dict(heads=heads, optimizer=optimizer), world, log=log, restart=True)
    if not run.finished:
        run.log.print(f"{encoder.name}: {len(keys)} heads ({', '.join(map(str, levels))} x {', '.join(names)}) on "
                  f"{len(train)} images of {train.name}; {world.size} process(es) on {world.device.type}")
    train_heads(run, heads, optimizer, examples, probe.n_epoch, batches.per_epoch, lr, options.steps)
    if options.steps is not None:
        return distributed.stop()
    accuracies = test_heads(heads, test_features(encoder, items, levels, names, options.test_draws), world)
    accuracies = {key: accuracies[key] for key in keys}
    report(run, encoder, accuracies, levels, names, options)
    distributed.stop()


def chosen(options: argparse.Namespace, encoder: Encoder) -> tuple[list[int], list[str]]:
    """Return the levels and blocks to probe; UserError for ones that there are not."""
    from DDAE.ddae.diffusion import GRID_LEVELS

    kind, probe = encoder.diffusion.kind, encoder.probe
    levels = options.levels or (list(GRID_LEVELS[kind]) if options.grid else [probe.timestep])
    names = options.names or (list(encoder.widths) if options.grid or encoder.pixels else [probe.blockname])
    encoder.check_levels(levels)
    encoder.check_names(names)
    return list(dict.fromkeys(levels)), list(dict.fromkeys(names))


class FreshExamples:
    """The features of a step's images, augmented and noised anew at every visit."""

    def __init__(self, encoder: Encoder, batches: TrainBatches, levels: Sequence[int], names: Sequence[str]) -> None:
        self.encoder, self.batches, self.levels, self.names = encoder, batches, levels, names

    def __call__(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
        batch, features = self.batches(step), {}
        for level in self.levels:
            noise = batch.noise(self.batches.seed, step, f"noise {level}")
            found = self.encoder.features(batch.images, level, noise, self.names)
            features |= {f"{level}/{name}": value for name, value in found.items()}
        return features, batch.labels, batch.share


def test_features(encoder: Encoder, items: TestItems, levels: Sequence[int], names: Sequence[str], draws: int
                  ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yield (key -> [draws, n, width], labels [n]) for this rank's test images; noise depends on image and draw."""
    from shared.training.progress import progress

    for batch in progress(items, "test", len(items.starts), "batches", shown=items.world.main):
        found: dict[str, list[torch.Tensor]] = {}
        for draw in range(draws):
            noise = items.noise(batch, f"test noise {draw}")
            for level in levels:
                for name, value in encoder.features(batch.images, level, noise, names).items():
                    found.setdefault(f"{level}/{name}", []).append(value)
        yield {key: torch.stack(values) for key, values in found.items()}, batch.labels


def report(run: Run, encoder: Encoder, accuracies: dict[str, float], levels: Sequence[int], names: Sequence[str],
           options: argparse.Namespace) -> None:
    """Print the accuracies; write result.json and the heads, for several also table.csv, table.md and two pictures."""
    from DDAE.ddae.probe import write_result

    for key, accuracy in accuracies.items():
        run.log.print(f"[key {key}]: Test acc: {100 * accuracy:.2f}")
    if not run.world.main:
        return
    asked = f"{encoder.probe.timestep}/{encoder.probe.blockname}"
    write_result(run, run.keep["heads"], accuracies, asked if asked in accuracies else next(iter(accuracies)),
                 test_draws=options.test_draws)
    if len(accuracies) > 1:
        write_grid(run.outdir, encoder, accuracies, levels, names)
        best = max(accuracies, key=accuracies.get)
        run.log.print(f"best: {best}, {100 * accuracies[best]:.2f}; table.md, table.csv, grid.png and curves.png are in "
                  f"{run.outdir}")


def write_grid(out: Path, encoder: Encoder, accuracies: dict[str, float], levels: Sequence[int], names: Sequence[str]
               ) -> None:
    """Write the accuracies over noise levels and blocks as a table, a heat map and curves, in percent."""
    import csv

    import numpy as np

    from shared.report.plots import curves, heat_map
    from shared.training.files import atomic

    table = [[100 * accuracies[f"{level}/{name}"] for name in names] for level in levels]
    with atomic(out / "table.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["time", *names])
        writer.writerows([level, *(f"{value:.2f}" for value in row)] for level, row in zip(levels, table, strict=True))
    lines = [f"| time | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| {level} | {' | '.join(f'{value:.2f}' for value in row)} |"
              for level, row in zip(levels, table, strict=True)]
    with atomic(out / "table.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    title = f"{Path(encoder.config.source).stem} {encoder.name}: linear probe, test accuracy in %"
    heat_map(np.array(table), list(map(str, levels)), list(names), out / "grid.png", title=title,
             xlabel="decoder block", ylabel="noise level")
    curves({"over blocks": {f"level {level}": (range(1, len(names) + 1), row)
                            for level, row in zip(levels, table, strict=True)},
            "over noise levels": {name: (levels, column)
                                  for name, column in zip(names, zip(*table, strict=True), strict=True)}},
           out / "curves.png", {"over blocks": "decoder block", "over noise levels": "noise level"})


if __name__ == "__main__":
    run_main(main)
