"""The labelled split: published, drawn, or read from a file; and the pseudo-labels that get_labels.py wrote."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from shared.cli import UserError
from shared.data.datasets import NAMES, has_split, load_dataset
from shared.data.safe import load_array
from shared.training.randomness import numpy_rng

INDEX_FILE, PSEUDO_LABEL_FILE = "sampled_label_idx.npy", "pseudo_label.npy"
SMOOTHING = 1e-3  # the fraction of a row of a transition matrix that is spread over all classes: each stays possible

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


def labeled_and_held_out(options: SimpleNamespace, labels: np.ndarray, num_classes: int,
                         folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return positions in the pool, int64: of the labelled images, and of --val_fraction of all, drawn from the rest.

    labels: of the pool, -1 where unknown. folder: an earlier split in it must be that of this command. If every image
    is labelled, the held-out ones are taken from these. Raises UserError.
    """
    known = np.flatnonzero(labels >= 0)
    count = round(options.val_fraction * len(labels))
    rng = numpy_rng(options.seed, 0, "validation")
    if options.num_labels == 0 and options.label_idx is None:
        if count >= len(known):
            raise UserError(f"--val_fraction {options.val_fraction}: {count} images to hold out of {len(known)} that "
                            "have a label leave none to learn from")
        held_out = np.sort(rng.choice(known, count, replace=False))
        labels = labels.copy()
        labels[held_out] = -1
        return labeled_index(options, labels, num_classes, folder), held_out
    index = labeled_index(options, labels, num_classes, folder)
    rest = np.setdiff1d(known, index)
    if count > len(rest):
        raise UserError(f"--val_fraction {options.val_fraction}: {count} images to hold out, but only {len(rest)} "
                        "have a label and are not among the labelled ones")
    return index, np.sort(rng.choice(rest, count, replace=False)) if count else rest[:0]


def labeled_index(options: SimpleNamespace, labels: np.ndarray, num_classes: int, folder: Path) -> np.ndarray:
    """Return the positions of the labelled images in the pool, int64; UserError if `folder` holds another split."""
    if options.label_idx is not None:
        index = read_index(options.label_idx, labels, "--label_idx")
    elif options.num_labels == 0:
        index = np.flatnonzero(labels >= 0).astype(np.int64)
    elif options.dataset == "cifar10" and options.num_labels == 10 and options.label_table:
        index = cifar10_one_label_split(options.seed)
    else:
        index = class_balanced_split(labels, options.num_labels, num_classes, options.seed)
    file = folder / INDEX_FILE
    if options.overwrite or not file.exists():
        return index
    if not np.array_equal(earlier := read_index(str(file), labels, "the run folder"), index):
        facts, source = split_facts(options, num_classes), file.with_suffix(".json")
        was = json.loads(source.read_text(encoding="utf-8")) if source.exists() else {}
        changed = [f"{key} {was[key]} there, {now} here" for key, now in facts.items() if was.get(key, now) != now]
        reason = "; ".join(changed) or f"{len(earlier)} other images than the {len(index)} of this command"
        raise UserError(f"{file} holds the labelled images of another run ({reason}); choose another --save_name, "
                        f"keep those images with --label_idx {file}, or give --overwrite to move that run aside")
    return index


def class_balanced_split(labels: np.ndarray, num_labels: int, num_classes: int, seed: int) -> np.ndarray:
    """Draw num_labels / num_classes images of every class; return int64 indices [num_labels], class after class.

    labels: int [N], -1 where unknown (never drawn). For each class in turn the positions of its images, in ascending
    order, are permuted by one `RandomState(seed)` and the first ones are kept, in drawn order: the published draws, so
    that a seed names the images of the papers' tables.

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


def split_facts(options: SimpleNamespace, num_classes: int) -> dict[str, Any]:
    """Return the settings of a drawn split, for the file beside it."""
    dataset = options.dataset if options.dataset in NAMES else str(Path(options.dataset).absolute())
    return {"dataset": dataset, "num_labels": options.num_labels, "num_classes": num_classes, "seed": options.seed,
            "label_table": options.label_table, "label_idx": options.label_idx is not None}


def read_index(file: str, labels: np.ndarray, flag: str) -> np.ndarray:
    """Read int64 indices of labelled images; UserError, naming `flag`, unless they fit the `labels` of the data set."""
    index = load_array(file, f"{flag} {file}")
    if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
        raise UserError(f"{flag}: {file} must hold a one-dimensional array of integers")
    if index.min() < 0 or index.max() >= len(labels) or len(np.unique(index)) < len(index):
        raise UserError(f"{flag}: {file} must hold different positions in 0..{len(labels) - 1}, the training images")
    if (labels[index] < 0).any():
        raise UserError(f"{flag}: {file} names {(labels[index] < 0).sum()} images without a known label")
    return index.astype(np.int64)


def labeled_part(dataset: str, data_dir: str, pool: int) -> slice:
    """Return the part of a pool of `pool` images from which labels are drawn: the training images.

    Indices count from its start; further unlabelled images stand before it.
    """
    if not has_split(dataset, "unlabeled"):
        return slice(0, pool)
    return slice(pool - len(load_dataset(dataset, "train", data_dir)), pool)


def read_pseudo_labels(file: str | Path, flag: str) -> np.ndarray:
    """Return pseudo-labels, int64 [N]; UserError, naming `flag`, for a missing file or anything but class numbers."""
    if not Path(file).exists():
        raise UserError(f"{flag}: there is no {file}; get_labels.py writes it")
    labels = load_array(file, f"{flag} {file}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise UserError(f"{flag}: {file} must hold one class number per training image, as get_labels.py writes it")
    return labels.astype(np.int64)


# ------------------------------------------------------------------------------------------- errors of (pseudo-)labels

def rows_of(counts: np.ndarray, smoothing: float) -> np.ndarray:
    """Return rows [C, C] of sum 1, the fraction `smoothing` of each spread over all columns; an empty row is that of
    the identity."""
    sums = counts.sum(1, keepdims=True)
    rows = np.where(sums > 0, counts / np.where(sums > 0, sums, 1), np.eye(len(counts)))
    return (1 - smoothing) * rows + smoothing / len(counts)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the total variation between rows, averaged over classes: 0 (equal) to 1."""
    return float(np.abs(a - b).sum(1).mean() / 2)


def compared_with_truth(estimate: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the true transition matrix and the distances from it, for a file of an estimate [C, C].

    truth, labels: int64 [N], -1 unknown.
    """
    known = (truth >= 0) & (labels >= 0)
    counts = np.zeros_like(estimate)
    np.add.at(counts, (truth[known], labels[known]), 1)
    true = rows_of(counts, 0.0)
    return {"true_transition_matrix": true.tolist(), "error": distance(estimate, true),
            "error_of_no_noise": distance(np.eye(len(true)), true)}
