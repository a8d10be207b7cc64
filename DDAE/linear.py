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

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from DDAE.ddae.data import TestItems, TrainBatches
from DDAE.ddae.features import stored_examples
from DDAE.ddae.model import check_names
from DDAE.ddae.probe import (
    ENCODER,
    PIXELS,
    Encoder,
    Examples,
    LinearHeads,
    load_encoder,
    load_split,
    test_heads,
    train_heads,
    write_probes,
)
from shared import cli, distributed
from shared.cli import Choice, Flag, Int, IntList, Option, Text, less_memory, run_main
from shared.report.plots import Panel, curves, heat_map
from shared.report.table_report import markdown_table
from shared.training.files import write_csv, write_text
from shared.training.log import Log
from shared.training.progress import progress
from shared.training.run import Run

FLAGS = (
    *ENCODER,
    Option("--grid", Flag, False, "all blocks; levels 1, 11, 21 (DDPM) or 3, 4, 5 (EDM)"),
    Option("--times", IntList(0), None, "noise levels, in place of the usual ones", metavar="N,N,..."),
    Option("--blocks", Text, None, "blocks, in place of the usual ones", metavar="NAME,..."),
    Option("--copies", Int(0), 0, "augmented and noised copies of the training set to train on, whose features are "
           "computed once and kept on disk; 0: fresh ones in every epoch, as published"),
    Option("--test_draws", Int(1), 1, "draws of the noise per test image, whose logits are averaged"),
    Option("--encoder", Choice("trained", "untrained", PIXELS), "trained", "compare with fresh weights, or with the "
           "pixels themselves"),
    Option("--outdir", Text, None, "folder of the results", default_help="{save_dir}/linear/...", metavar="DIR"),
    Option("--steps", Int(1), None, "end after this number of steps, without a test, to measure their time"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


@less_memory("linear.batch_size of the config (--set linear.batch_size=N)")
def main() -> None:
    options = parse()
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
    inputs = encoder.inputs(train, world)
    if options.copies:
        examples = stored_examples(encoder, batches, levels, names, options.copies, inputs["dataset"])
    else:
        examples = fresh_examples(encoder, batches, levels, names)

    config = {"probes": list(keys), "dataset": encoder.config.dataset, "encoder": encoder.name, "batch": size, "lr": lr,
              "epochs": probe.n_epoch, "flip": probe.flip, "pad": probe.pad, "seed": seed, "copies": options.copies,
              "precision": encoder.precision}
    kind = "grid" if options.grid or len(keys) > 1 else f"{levels[0]}_{names[0]}"
    outdir = Path(options.outdir or Path(encoder.config.save_dir) / "linear" / f"{encoder.name}_{kind}")
    log = Log(outdir, world, image_batch=size, desc="linear probe")
    run = Run(outdir, config, dict(heads=heads, optimizer=optimizer), world, log=log, overwrite=True, inputs=inputs,
              ignore=("weights",), extra=lambda: {"classes": batches.classes})
    if not run.finished:
        log.print(f"{encoder.name}: {len(keys)} heads ({', '.join(map(str, levels))} x {', '.join(names)}) on "
                  f"{len(train)} images of {train.name}; {world.size} process(es) on {world.device.type}")
    train_heads(run, heads, optimizer, examples, probe.n_epoch, batches.per_epoch, lr, options.steps)
    if options.steps is None:
        items = TestItems(test, probe.batch_size, world, seed)
        accuracies = test_heads(heads, test_features(encoder, items, levels, names, options.test_draws), world)
        report(run, encoder, {key: accuracies[key] for key in keys}, levels, names, options.test_draws)
    distributed.stop()


def chosen(options: SimpleNamespace, encoder: Encoder) -> tuple[list[int], list[str]]:
    """Return the levels and blocks to probe; UserError for unknown ones."""
    probe = encoder.probe
    levels = options.times or (encoder.diffusion.grid_levels if options.grid else [probe.timestep])
    names = list(encoder.widths) if options.grid or encoder.net is None else [probe.blockname]
    names = options.blocks.split(",") if options.blocks else names
    encoder.check_levels(levels)
    check_names(names, encoder.widths)
    return list(dict.fromkeys(levels)), list(dict.fromkeys(names))


def fresh_examples(encoder: Encoder, batches: TrainBatches, levels: Sequence[int], names: Sequence[str]) -> Examples:
    """Return the features by training step, of images that are augmented and noised anew at every visit."""
    def examples(step: int) -> tuple[dict[str, Tensor], Tensor, float]:
        batch, features = batches(step), {}
        for level in levels:
            noise = batch.noise(batches.seed, step, f"noise {level}")
            found = encoder.features(batch.images, level, noise, names)
            features |= {f"{level}/{name}": value for name, value in found.items()}
        return features, batch.labels, batch.fraction

    return examples


def test_features(encoder: Encoder, items: TestItems, levels: Sequence[int], names: Sequence[str], draws: int
                  ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield (key -> [draws, n, width], labels [n]) for this rank's test images; noise depends on image and draw."""
    for batch in progress(items, "test", len(items.starts), "batches", shown=items.world.main):
        found: dict[str, list[Tensor]] = {}
        for draw in range(draws):
            noise = items.noise(batch, f"test noise {draw}")
            for level in levels:
                for name, value in encoder.features(batch.images, level, noise, names).items():
                    found.setdefault(f"{level}/{name}", []).append(value)
        yield {key: torch.stack(values) for key, values in found.items()}, batch.labels


def report(run: Run, encoder: Encoder, accuracies: dict[str, float], levels: Sequence[int], names: Sequence[str],
           test_draws: int) -> None:
    """Print the accuracies; write result.json and the heads, for several also table.csv, table.md and two pictures."""
    for key, accuracy in accuracies.items():
        run.log.print(f"[key {key}]: Test acc: {100 * accuracy:.2f}")
    if not run.world.main:
        return
    asked = f"{encoder.probe.timestep}/{encoder.probe.blockname}"
    write_probes(run, run.keep["heads"], accuracies, asked if asked in accuracies else next(iter(accuracies)),
                 test_draws=test_draws)
    if len(accuracies) > 1:
        write_grid(run.outdir, encoder, accuracies, levels, names)
        best = max(accuracies, key=accuracies.get)
        run.log.print(f"best: {best}, {100 * accuracies[best]:.2f}; table.md, table.csv, grid.png and curves.png are "
                      f"in {run.outdir}")


def write_grid(out: Path, encoder: Encoder, accuracies: dict[str, float], levels: Sequence[int], names: Sequence[str]
               ) -> None:
    """Write the accuracies over noise levels and blocks as a table, a heat map and curves, in percent."""
    table = [[100 * accuracies[f"{level}/{name}"] for name in names] for level in levels]
    head, rows = ["time", *names], [[str(level), *(f"{value:.2f}" for value in row)]
                                    for level, row in zip(levels, table, strict=True)]
    write_csv(out / "table.csv", head, rows)
    write_text(out / "table.md", markdown_table(head, rows) + "\n")
    title = f"{Path(encoder.config.source).stem} {encoder.name}: linear probe"
    heat_map(np.array(table), list(map(str, levels)), list(names), out / "grid.png", title=title,
             xlabel="decoder block", ylabel="noise level (index)", unit="test accuracy, %")
    by_block = {f"level {level}": (range(1, len(names) + 1), row) for level, row in zip(levels, table, strict=True)}
    by_level = {name: (levels, column) for name, column in zip(names, zip(*table, strict=True), strict=True)}
    curves({"Linear probe by block": Panel(by_block, "decoder block", "test accuracy, %"),
            "Linear probe by noise level": Panel(by_level, "noise level (index)", "test accuracy, %")},
           out / "curves.png")


if __name__ == "__main__":
    run_main(main)
