"""The labels that a network was trained on: classes or lists of numbers, with their frequencies."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MOST_VECTORS = 4096  # of different ones that a snapshot keeps


@dataclass(frozen=True)
class Conditions:
    """The labels of a training set. counts: images of each class, or of each of `vectors`; () if unknown.

    names: of the classes, in label order, or (). vectors: float32 [M, D], different rows, where labels are lists of
    numbers. label_dim: width of the network's label input.
    """

    label_dim: int
    counts: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    vectors: torch.Tensor | None = None

    @property
    def present(self) -> list[int]:
        """The classes, or positions in `vectors`, that occurred; all classes if that is unknown."""
        return [index for index, count in enumerate(self.counts) if count] or list(range(self.label_dim))

    @property
    def draws_from(self) -> int:
        """The number of equally likely integers that `chosen` turns into classes."""
        return self.label_dim if self._is_uniform else sum(self.counts)

    @property
    def _is_uniform(self) -> bool:
        return not self.counts or self.vectors is None and len(set(self.counts)) == 1

    def chosen(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return classes, or positions in `vectors`, int64 [n], for integers below `draws_from`, int64 [n].

        Each occurs as often as in training. Where all classes do equally, a draw is the class, as published.
        """
        if self._is_uniform:
            return drawn
        return torch.searchsorted(torch.tensor(self.counts, device=drawn.device).cumsum(0), drawn, right=True)

    def inputs(self, chosen: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the network's label input, float32 [n, label_dim]."""
        table = torch.eye(self.label_dim) if self.vectors is None else self.vectors
        return table.to(device)[chosen]


def describe_labels(labels: np.ndarray, label_dim: int, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Return a snapshot's record of its training labels, int64 [N] or float32 [N, label_dim]; {} without labels.

    Of more than MOST_VECTORS different lists of numbers, evenly spaced ones in sorted order are kept.
    """
    if not label_dim:
        return {}
    if labels.dtype == np.int64:
        names = {"class_names": list(classes)} if classes else {}
        return {**names, "label_counts": np.bincount(labels, minlength=label_dim).tolist()}
    vectors, counts = np.unique(labels, axis=0, return_counts=True)
    kept = np.linspace(0, len(vectors) - 1, min(len(vectors), MOST_VECTORS)).round().astype(int)
    return {"label_vectors": vectors[kept].tolist(), "label_counts": counts[kept].tolist()}


def read_conditions(described: Mapping[str, Any], label_dim: int) -> Conditions:
    """Return a snapshot's record of its labels; published and older snapshots have none."""
    counts, names, vectors = (described.get(key) for key in ("label_counts", "class_names", "label_vectors"))
    is_list = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
    if not label_dim or not is_list or not 0 < sum(counts) < 1 << 31:
        return Conditions(label_dim)
    named = tuple(map(str, names)) if isinstance(names, list) and len(names) == label_dim else ()
    if vectors is None:
        return Conditions(label_dim, tuple(counts), named) if len(counts) == label_dim else Conditions(label_dim)
    table = torch.tensor(vectors, dtype=torch.float32)
    fits = table.shape == (len(counts), label_dim)
    return Conditions(label_dim, tuple(counts), vectors=table) if fits else Conditions(label_dim)
