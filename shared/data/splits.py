"""Which training images keep their labels: class-balanced splits that are reproducible from a seed.

The draws are those of the published semi-supervised code (NumPy's legacy generator, class after class), so that a
seed names the same labelled images here as in the papers' tables.
"""
from __future__ import annotations

import numpy as np

from shared.cli import UserError
from shared.training.randomness import numpy_rng


def class_balanced_split(labels: np.ndarray, num_labels: int, num_classes: int, seed: int) -> np.ndarray:
    """Draw num_labels / num_classes images of every class; return int64 indices [num_labels], class after class.

    labels: int [N], -1 where unknown (never drawn). For each class in turn the positions of its images, in ascending
    order, are permuted by one `RandomState(seed)` and the first ones are kept, in drawn order.

    Raises UserError where num_labels is not a positive multiple of num_classes, a label is out of range or a class
    has too few labelled images.
    """
    if num_labels <= 0 or num_labels % num_classes:
        raise UserError(f"--num_labels {num_labels} is not a positive multiple of the {num_classes} classes: "
                        f"the same number of labels is drawn from every class")
    labels = np.asarray(labels)
    if labels.size and labels.max() >= num_classes:
        raise UserError(f"--num_classes {num_classes}: the data set has a label {labels.max()}, expected at most "
                        f"{num_classes - 1}")
    if not 0 <= seed < 2 ** 32:
        raise UserError(f"--seed {seed} is out of range: expected 0 to {2 ** 32 - 1}")
    per_class = num_labels // num_classes
    draw = np.random.RandomState(seed)
    chosen = []
    for label in range(num_classes):
        positions = np.flatnonzero(labels == label)
        if len(positions) < per_class:
            raise UserError(f"--num_labels {num_labels} asks for {per_class} labels of every class, but class {label} "
                            f"has {len(positions)} labelled images")
        chosen.append(positions[draw.permutation(len(positions))[:per_class]])
    return np.concatenate(chosen).astype(np.int64)


def class_balanced_draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return int64 positions: `per_class` of every class in `labels` [N], each image as evenly often as possible."""
    chosen = []
    for label in np.unique(labels):
        positions = numpy_rng(seed, int(label), "balanced pseudo-labels").permutation(np.flatnonzero(labels == label))
        chosen.append(np.resize(positions, per_class))
    return np.concatenate(chosen)
