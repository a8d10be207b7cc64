"""What the noise-conditional classifiers have in common: accuracy over noise levels, its file and its picture."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from DDAE.ddae.batches import TestItems
from shared import distributed
from shared.cli import UserError
from shared.distributed import World
from shared.report.plots import curves
from shared.training.files import atomic
from shared.training.hardware import computed_on
from shared.training.progress import progress
from shared.training.run import Run

Classify = Callable[[Tensor, int, Tensor], Tensor]  # images [n, C, H, W] in [0, 1], level, noise -> logits


@torch.no_grad()
def accuracy_by_level(classify: Classify, items: TestItems, levels: Sequence[int], world: World) -> dict[int, float]:
    """Return level -> share of the test items that are classified correctly, over all ranks, each counted once.

    An image has the same noise at every level, which depends on the item alone.
    """
    correct = torch.zeros(len(levels), dtype=torch.int64, device=world.device)
    for batch in progress(items, "test", len(items.starts), "batches", shown=world.main):
        noise = items.noise(batch, "test noise 0")
        for place, level in enumerate(levels):
            correct[place] += (classify(batch.images, level, noise).argmax(1) == batch.labels).sum()
    return dict(zip(levels, (distributed.sum_(correct, world).double() / len(items)).tolist(), strict=True))


def report_by_level(run: Run, name: str, accuracies: Mapping[int, float], compare: Sequence[str]) -> None:
    """Print a line per level; write result.json and curve.png with the curves of other result.json files beside it.

    The accuracy of the result is the mean over levels.
    """
    for level, accuracy in accuracies.items():
        run.print(f"[timestep {level}]: Test acc: {accuracy:.3f}")
    if not run.world.main:
        return
    with atomic(run.outdir / "result.json", "w") as file:
        json.dump({"name": name, "accuracy": {"last": sum(accuracies.values()) / len(accuracies)}, "by_level":
                   {str(level): value for level, value in accuracies.items()}, "seed": run.config["seed"],
                   "iterations": run.step, "precision": run.config["precision"], "seconds": round(run.seconds, 1),
                   **computed_on(run.world.device), "config": run.config}, file, indent=1)
    lines = {name: (list(accuracies), list(accuracies.values()))}
    for path in compare:
        lines.update(read_curve(path))
    curves({"accuracy over noise levels": lines}, run.outdir / "curve.png",
           {"accuracy over noise levels": "noise level (index)"})
    run.print(f"result.json and curve.png are in {run.outdir}")


def read_curve(path: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return name -> (levels, accuracies) of a result.json of a noise-conditional classifier; UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = content["by_level"]
        return {str(content["name"]): ([int(level) for level in found], [float(a) for a in found.values()])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--compare {path}: not the result.json of a noise-conditional classifier") from None
