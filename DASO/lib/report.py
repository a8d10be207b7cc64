"""The reports of a run: quality of its pseudo-labels, history of accuracies, result files.

results.json is the published history; summary.json holds last, median of the last 20 and best side by side, by class
and group of classes too; result.json the same in short, for tables.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from DASO.lib.evaluation import grouped
from shared.training.checkpoint import Stateful
from shared.training.files import write_json

# Kind -> (name of its imbalance, of its per-class numbers, of its means).
NAMES = {"main": ("main_pl", "main_pl", "pl"), "linear": ("linear_pl", "linear_pl", "linear_pl"),
         "semantic": ("semantic_pl", "sem_pl", "sem_pl")}
KINDS = tuple(NAMES)
NOTHING = -1.0  # precision of a class that is never predicted, imbalance of no labels
MEDIAN_OF = 20  # evaluations in the published accuracy
TRACKED = ("top1", "top1_la")  # accuracies with a history, by split
GROUPS = ("many", "medium", "few")


# -------------------------------------------------------------------------------------------------------- pseudo-labels

class PseudoLabelStatistics(Stateful):
    """Counts on the device, of the global batches since the last call of `counts`.

    confusion: int64 [kind, K + 1, K], rows true classes (the last one: unknown), columns pseudo-labels. labelled: int64
    [K], labels of the labelled batches.
    """

    state = ("confusion", "labelled")

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.confusion = torch.zeros(len(KINDS), num_classes + 1, num_classes, dtype=torch.int64, device=device)
        self.labelled = torch.zeros(num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, labels: Tensor, truth: Tensor, pseudo_labels: Mapping[str, Tensor]) -> None:
        """Count a global batch: labels int64 [B_l]; truth int64 [B_u], -1 unknown; kind -> int64 [B_u], -1 for none."""
        self.labelled.scatter_add_(0, labels, torch.ones_like(labels))
        row = torch.where(truth >= 0, truth, self.num_classes)
        for kind, predicted in pseudo_labels.items():
            counted = (predicted >= 0).long()
            place = row * self.num_classes + predicted.clamp(min=0)
            self.confusion[KINDS.index(kind)].view(-1).scatter_add_(0, place, counted)

    def counts(self) -> dict[str, np.ndarray]:
        """Return kind -> confusion int64 [K + 1, K] of the kinds counted, and "labels" -> [K]; begin anew."""
        confusion, labelled = self.confusion.cpu().numpy(), self.labelled.cpu().numpy()
        self.confusion, self.labelled = torch.zeros_like(self.confusion), torch.zeros_like(self.labelled)
        found = {kind: matrix for kind, matrix in zip(KINDS, confusion, strict=True) if matrix.any()}
        return {"labels": labelled, **found}


def rates(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return recall, precision and gain [K] of pseudo-labels with known truth, from counts [K (+1), K].

    Gain: predicted by true images of the class. Recall and gain are NaN for a class that is absent, the precision of
    one that is never predicted is -1, as published.
    """
    known = confusion[:confusion.shape[1]].astype(np.float64)
    true, predicted, right = known.sum(1), known.sum(0), known.diagonal()
    absent = np.where(true > 0, true, np.nan)
    precision = np.where(predicted > 0, right / np.maximum(predicted, 1), NOTHING)
    return {"recall": right / absent, "precision": precision, "gain": predicted / absent}


def pseudo_label_numbers(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the published numbers by name; those that an absent class leaves undefined are left out."""
    values: dict[str, float] = {}
    labels = counts["labels"]
    if labels.min() > 0:
        values["imb_factors/gt_label"] = float(labels.max() / labels.min())
    for kind, (balance, each, mean) in NAMES.items():
        if kind not in counts:
            continue
        predicted = counts[kind].sum(0)
        present = predicted[predicted > 0]
        values[f"imb_factors/{balance}"] = float(present.max() / present.min()) if len(present) else NOTHING
        if not counts[kind][:-1].any():
            continue  # no true labels are known
        found = rates(counts[kind])
        for name, numbers in found.items():
            values |= {f"{each}_{name}/{c}": float(number) for c, number in enumerate(numbers) if not np.isnan(number)}
        values[f"avg_recall/{mean}"] = float(np.nanmean(found["recall"]))
        values[f"avg_prec/{mean}"] = float(found["precision"].mean())
    return values


# -------------------------------------------------------------------------------------------------------------- history

def extend_history(history: dict[str, list[float]], found: Mapping[str, float], split: str) -> dict[str, float]:
    """Append the newest accuracies of a split to their history; return the medians of the last 20."""
    medians = {}
    for name in TRACKED:
        key = f"{split}/{name}"
        history.setdefault(key, []).append(found[key])
        medians[f"{key}_median20"] = float(np.median(history[key][-MEDIAN_OF:]))
        history.setdefault(f"{key}_median20", []).append(medians[f"{key}_median20"])
    return medians


def extend_courses(courses: dict[str, list[Any]], iteration: int, found: Mapping[str, float],
                   classes: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray],
                   confusions: Mapping[str, np.ndarray]) -> None:
    """Append an evaluation: accuracies overall, by class [K] and by group; rates of the pseudo-labels by class."""
    newest: dict[str, Any] = {}
    for split, accuracies in classes.items():
        newest |= {f"{split}/top1": found[f"{split}/top1"], f"{split}/classes": accuracies.tolist()}
        newest |= {f"{split}/{group}": mean for group, mean in grouped(accuracies, groups).items()}
    for kind, confusion in confusions.items():
        if kind != "labels" and confusion[:-1].any():
            newest |= {f"pseudo_labels/{kind}/{name}": numbers.tolist() for name, numbers in rates(confusion).items()}
    for name, value in {**newest, "iteration": iteration}.items():
        courses.setdefault(name, []).append(value)


def console_line(values: Mapping[str, float], iteration: int, total: int, seconds: float, memory: int) -> str:
    """Return the line of an evaluation. seconds: spent so far; memory: on the device, in bytes, 0 on a CPU."""
    left = seconds / max(1, iteration) * (total - iteration)
    losses = "  ".join(f"{name.removeprefix('train/')}: {value:.4g}" for name, value in values.items()
                       if name.startswith("train/") and "loss" in name)
    accuracies = "  ".join(f"{split}_{name}: {values[f'{split}/{name}']:.2f}" for split in ("valid", "test")
                           for name in ("top1", "top1_median20", "top1_la") if f"{split}/{name}" in values)
    shown = f"  max_mem: {-(-memory // 2 ** 20)}M" if memory else ""
    return (f"eta: {int(left)}s  iter: {iteration}/{total}  {losses}  iter_time: {values['misc/iter_time']:.4f}  "
            f"data_time: {values['misc/data_time']:.4f}  lr: {values['misc/lr']:.4g}{shown}  {accuracies}")


# ---------------------------------------------------------------------------------------------------------------- files

def write_history(folder: Path, state: Mapping[str, Any], counts: np.ndarray) -> None:
    """Write results.json and summary.json from the run's state, as far as it has come. counts: labelled images [K]."""
    courses = state["courses"]
    write_json(folder / "results.json", state["history"], indent=4, sort_keys=True)
    if not courses:
        return
    numbers = {name: values for name, values in courses.items() if name.startswith(("valid/", "test/"))}
    labels = {name: values[-1] for name, values in courses.items() if name.startswith("pseudo_labels/")}
    write_json(folder / "summary.json", {
        "iteration": courses["iteration"][-1], "labelled_counts": counts.tolist(), "accuracy": summary(numbers),
        "pseudo_labels": labels, "courses": courses}, indent=None)


def summary(courses: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Return last value, median of the last 20 and best of each course of accuracies, numbers or lists [K]."""
    found = {}
    for name, values in courses.items():
        numbers = np.array(values, np.float64)
        found[name] = {"last": numbers[-1].tolist(), "median20": np.median(numbers[-MEDIAN_OF:], axis=0).tolist(),
                       "best": numbers.max(0).tolist()}
    return found


def write_result(folder: Path, state: Mapping[str, Any], facts: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Write result.json of a finished run: accuracies as fractions by protocol, settings and hardware."""
    courses = state["courses"]
    split = "test" if "test/top1" in courses else "valid"
    if f"{split}/top1" not in courses:
        return
    result = {
        **facts, "split": split, "accuracy": protocols(courses, f"{split}/top1"),
        "accuracy_logit_adjusted": protocols({"x": state["history"][f"{split}/top1_la"]}, "x"),
        "groups": {group: protocols(courses, f"{split}/{group}") for group in GROUPS if f"{split}/{group}" in courses},
        "accuracy_by_class": [value / 100 for value in courses[f"{split}/classes"][-1]],
        "pseudo_labels": {name.removeprefix("pseudo_labels/"): values[-1] for name, values in courses.items()
                          if name.startswith("pseudo_labels/")},
        **computed}
    write_json(folder / "result.json", result)


def protocols(courses: Mapping[str, list[Any]], name: str) -> dict[str, Any]:
    """Return a course of accuracies in percent as fractions by protocol.

    Last, median of the last 20 (the published number), best on the set itself, and at the best accuracy on the
    validation images.
    """
    values = np.array(courses[name], np.float64) / 100
    found = {"last": float(values[-1]), "median_of_last_20": float(np.median(values[-MEDIAN_OF:])),
             "best_on_test": float(values.max())}
    if "valid/top1" in courses and name.startswith("test/"):
        found["best_on_validation"] = float(values[int(np.argmax(courses["valid/top1"]))])
    return found
