"""What a run leaves: results.json, the published course of accuracies; summary.json, last, median of the last 20 and
best side by side, by class and group of classes too; result.json, the same in short for tables.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from DASO.lib.evaluation import MEDIAN_OF, summary
from shared.training.files import atomic
from shared.training.precision import computed_on

if TYPE_CHECKING:
    from DASO.lib.trainer import Trainer

GROUPS = ("many", "medium", "few")


def write_results(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Write results.json and summary.json from the run's state, as far as it has come."""
    with atomic(trainer.folder / "results.json", "w") as file:
        json.dump(state["history"], file, indent=4, sort_keys=True)
    courses = {name: values for name, values in state["courses"].items() if values}
    if not courses:
        return
    numbers = {name: values for name, values in courses.items() if name.startswith(("valid/", "test/"))}
    labels = {name: values[-1] for name, values in courses.items() if name.startswith("pseudo_labels/")}
    content = {"iteration": courses["iteration"][-1], "labelled_counts": trainer.data.counts.tolist(),
               "accuracy": summary(numbers), "pseudo_labels": labels, "courses": courses}
    with atomic(trainer.folder / "summary.json", "w") as file:
        json.dump(content, file)


def write_result(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Write result.json of a finished run: accuracies as fractions by protocol, what was run, and on what."""
    cfg, courses = trainer.cfg, state["courses"]
    split = "test" if "test/top1" in courses else "valid"
    if f"{split}/top1" not in courses:
        return
    result = {
        "name": trainer.folder.name, "algorithm": cfg.ALGORITHM.NAME, "dataset": cfg.DATASET.NAME, "seed": cfg.SEED,
        "iterations": cfg.SOLVER.MAX_ITER, "split": split, "labelled_counts": trainer.data.counts.tolist(),
        "accuracy": protocols(courses, f"{split}/top1"),
        "accuracy_logit_adjusted": protocols({"x": state["history"][f"{split}/top1_la"]}, "x"),
        "groups": {group: protocols(courses, f"{split}/{group}") for group in GROUPS if f"{split}/{group}" in courses},
        "accuracy_by_class": [value / 100 for value in courses[f"{split}/classes"][-1]],
        "pseudo_labels": {name.removeprefix("pseudo_labels/"): values[-1] for name, values in courses.items()
                          if name.startswith("pseudo_labels/")},
        "seconds": trainer.run.seconds, "precision": trainer.precision,
        "processes": trainer.world.size, **computed_on(trainer.world.device)}
    with atomic(trainer.folder / "result.json", "w") as file:
        json.dump(result, file, indent=1)


def protocols(courses: Mapping[str, list[Any]], name: str) -> dict[str, Any]:
    """Return a course of accuracies in percent as fractions: last, median of the last 20 (the published number), best
    on the set itself, and at the best accuracy on the validation images.
    """
    values = np.array(courses[name], np.float64) / 100
    found = {"last": float(values[-1]), "median_of_last_20": float(np.median(values[-MEDIAN_OF:])),
             "best_on_test": float(values.max())}
    if "valid/top1" in courses and name.startswith("test/"):
        found["best_on_validation"] = float(values[int(np.argmax(courses["valid/top1"]))])
    return found
