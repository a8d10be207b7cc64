"""Which training images keep their labels: class-balanced splits that are reproducible from a seed.

The draws are those of the published semi-supervised code (NumPy's legacy generator, class after class), so that a
seed names the same labelled images here as in the papers' tables.
"""
from __future__ import annotations

import numpy as np

from shared.cli import UserError
from shared.training.randomness import numpy_rng

# CIFAR-10 with one label a class: the eight labelled sets that FixMatch and its successors report on, by seed
# (Sohn et al. 2020, "barely supervised learning"). Indices into the 50,000 training images in published order.
CIFAR10_ONE_LABEL_A_CLASS = (
    (4255, 6446, 8580, 11759, 12598, 29349, 29433, 33759, 35345, 38639),
    (1156, 11501, 19974, 21963, 32103, 42189, 46789, 47690, 48229, 48675),
    (12830, 20293, 26835, 30517, 30898, 31061, 43693, 46501, 47310, 48517),
    (6695, 14891, 19726, 22715, 23999, 34230, 46511, 47457, 49181, 49397),
    (9915, 9978, 16631, 19915, 28008, 35314, 35801, 36149, 39215, 42557),
    (7510, 13186, 14043, 21305, 22805, 31288, 34508, 40470, 41493, 45506),
    (5022, 8193, 8902, 9601, 25226, 26223, 34089, 35186, 40595, 48024),
    (7408, 8148, 9850, 10361, 33949, 36506, 37018, 45044, 46443, 47447),
)


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


def cifar10_one_label_split(seed: int) -> np.ndarray:
    """Return the published ten labelled indices of CIFAR-10 for seed 0 to 7, int64 [10]; UserError for other seeds."""
    if not 0 <= seed < len(CIFAR10_ONE_LABEL_A_CLASS):
        raise UserError(f"--seed {seed}: the published sets of ten CIFAR-10 labels exist for seeds 0 to "
                        f"{len(CIFAR10_ONE_LABEL_A_CLASS) - 1}; use one of them or --label_table False")
    return np.array(CIFAR10_ONE_LABEL_A_CLASS[seed], dtype=np.int64)


def class_balanced_draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return int64 positions: `per_class` of every class in `labels` [N], each image as evenly often as possible."""
    chosen = []
    for label in np.unique(labels):
        positions = numpy_rng(seed, int(label), "balanced pseudo-labels").permutation(np.flatnonzero(labels == label))
        chosen.append(np.resize(positions, per_class))
    return np.concatenate(chosen)
