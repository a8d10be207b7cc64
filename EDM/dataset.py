"""The training set of EDM: a folder or ZIP of square images, with one-hot or vector labels."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TrainingSet:
    """Images with conditioning labels.

    images: uint8 [N, C, R, R], memory-mapped; the files in sorted order, without mirrored copies.
    labels: float32 [N, label_dim]; one-hot, or the vectors of dataset.json; label_dim 0 without labels.
    raw_labels: int64 [N] (classes), float32 [N, label_dim] (vectors), or [N, 0] without labels.
    indices: int64 [len]; which image each item shows (after max_size; doubled by xflip).
    flipped: bool [len]; whether the item is mirrored.
    name: base name of the path without its last extension.
    """

    images: np.ndarray
    labels: np.ndarray
    raw_labels: np.ndarray
    indices: np.ndarray
    flipped: np.ndarray
    name: str

    # also: len(), .label_dim, .resolution, .num_channels, .has_onehot_labels, [i] -> (image, label)


def open_training_set(path: str, use_labels: bool = False, max_size: int | None = None, xflip: bool = False,
                      seed: int = 0, cache: bool = True, resolution: int | None = None) -> TrainingSet:
    """Open the training set at `path`."""
    raise NotImplementedError
