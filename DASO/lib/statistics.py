"""How good pseudo-labels are: recall, precision and gain of every class, over the iterations since the last report."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Kind -> (name of its imbalance, of its per-class numbers, of its means).
NAMES = {"main": ("main_pl", "main_pl", "pl"), "linear": ("linear_pl", "linear_pl", "linear_pl"),
         "semantic": ("semantic_pl", "sem_pl", "sem_pl")}
KINDS = tuple(NAMES)
NOTHING = -1.0  # precision of a class that is never predicted, imbalance of no labels


class PseudoLabelStatistics:
    """Counts on the device, of the global batches.

    confusion: int64 [kind, K + 1, K], rows true classes (the last one: unknown), columns pseudo-labels. labelled: int64
    [K], labels of the labelled batches.
    """

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
        """Return kind -> confusion int64 [K + 1, K] of the kinds counted, and "labels" -> [K]; then forget."""
        confusion, labelled = self.confusion.cpu().numpy(), self.labelled.cpu().numpy()
        self.confusion = torch.zeros_like(self.confusion)
        self.labelled = torch.zeros_like(self.labelled)
        found = {kind: matrix for kind, matrix in zip(KINDS, confusion, strict=True) if matrix.any()}
        return {"labels": labelled, **found}

    def state_dict(self) -> dict[str, Tensor]:
        return {"confusion": self.confusion, "labelled": self.labelled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.confusion.copy_(state["confusion"])
        self.labelled.copy_(state["labelled"])


def imbalance(counts: np.ndarray) -> float:
    """Return the largest count divided by the smallest that is not 0; -1 where all are."""
    present = counts[counts > 0]
    return float(present.max() / present.min()) if len(present) else NOTHING


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


def report(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the published numbers under their names; those that an absent class leaves undefined are left out."""
    values: dict[str, float] = {}
    labels = counts["labels"]
    if labels.min() > 0:
        values["imb_factors/gt_label"] = float(labels.max() / labels.min())
    for kind, (balance, each, mean) in NAMES.items():
        if kind not in counts:
            continue
        values[f"imb_factors/{balance}"] = imbalance(counts[kind].sum(0))
        if not counts[kind][:-1].any():
            continue  # no true labels are known
        found = rates(counts[kind])
        for name, numbers in found.items():
            values |= {f"{each}_{name}/{c}": float(number) for c, number in enumerate(numbers) if not np.isnan(number)}
        values[f"avg_recall/{mean}"] = float(np.nanmean(found["recall"]))
        values[f"avg_prec/{mean}"] = float(found["precision"].mean())
    return values
