"""Which images a long-tailed experiment uses: counts a class, and the published selection from a seed."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.cli import UserError


def long_tail_counts(head: int, factor: float, num_classes: int, reverse: bool = False) -> np.ndarray:
    """Return the images a class, int64 [K]: `head` of the first, falling geometrically to head / factor, truncated.

    reverse: the last class is the most frequent one.
    """
    ranks = np.arange(num_classes)
    counts = np.array([int(head * (1.0 / factor) ** (rank / max(1, num_classes - 1))) for rank in ranks.tolist()])
    return counts[::-1].copy() if reverse else counts


def relative_counts(counts: np.ndarray) -> np.ndarray:
    """Return counts divided by their minimum, rounded to one decimal, float64 [K]."""
    counts = np.asarray(counts, np.float64)
    return np.round(counts / counts.min(), 1)


@dataclass(frozen=True)
class Selection:
    """Positions in the pool of training images, int64, in the published order. unlabelled: None where the data set has
    unlabelled images of its own, or none are used.
    """

    labelled: np.ndarray
    valid: np.ndarray
    unlabelled: np.ndarray | None = None


def select(labels: np.ndarray, num_classes: int, seed: int, *, head: int, factor: float, num_valid: int,
           unlabelled_head: int | None = None, unlabelled_factor: float = 1, reverse: bool = False,
           holdout: int | None = None) -> Selection:
    """Draw the validation, labelled and unlabelled images of an experiment from a pool with `labels` int64 [N].

    head, factor: of the labelled images; unlabelled_head, unlabelled_factor: of the unlabelled ones, None for no such
    set. reverse: the unlabelled ones are most
    frequent where the labelled ones are rarest. holdout: as many labelled images of every class become the validation
    set (of the initial validation images where the rarest class has not more than ten).

    Every stage draws from a fresh RandomState(seed), class after class. Raises UserError where a class has too few.
    """
    kept = np.arange(len(labels))
    valid = np.array([], np.int64)
    if num_valid > 0:
        valid, kept = _split(labels, kept, num_classes, seed, num_valid // num_classes)
        _nonempty(valid, kept, num_valid)
    labelled, unlabelled = kept, None
    if unlabelled_head is not None:
        labelled, rest = _split(labels, kept, num_classes, seed, head)
        unlabelled = _first(labels, rest, num_classes, unlabelled_head)
        _enough(labels, labelled, num_classes, np.full(num_classes, head), "labelled")
        _enough(labels, unlabelled, num_classes, np.full(num_classes, unlabelled_head), "unlabelled")
    if factor > 1:
        labelled = _thin(labels, labelled, num_classes, seed, long_tail_counts(head, factor, num_classes), "labelled")
    if holdout is not None:
        if int(head / factor) > 10:
            valid = _first(labels, labelled, num_classes, holdout)
            labelled = labelled[~np.isin(labelled, valid)]
            labelled = _by_class(labels, labelled, num_classes)
        else:
            valid = _first(labels, valid, num_classes, holdout)
    if unlabelled is not None and unlabelled_factor > 1:
        counts = long_tail_counts(unlabelled_head, unlabelled_factor, num_classes, reverse)
        unlabelled = _thin(labels, unlabelled, num_classes, seed, counts, "unlabelled", reverse)
    return Selection(labelled, valid, unlabelled)


def _of_class(labels: np.ndarray, pool: np.ndarray, label: int) -> np.ndarray:
    """Return the positions in `pool` whose images are of a class."""
    return np.flatnonzero(labels[pool] == label)


def _by_class(labels: np.ndarray, pool: np.ndarray, num_classes: int) -> np.ndarray:
    return np.concatenate([pool[_of_class(labels, pool, label)] for label in range(num_classes)])


def _split(labels: np.ndarray, pool: np.ndarray, num_classes: int, seed: int,
           first: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle every class; return the `first` of each, and the others, class by class."""
    draw, taken, rest = np.random.RandomState(seed), [], []
    for label in range(num_classes):
        positions = _of_class(labels, pool, label)
        draw.shuffle(positions)
        taken.append(pool[positions[:first]])
        rest.append(pool[positions[first:]])
    return np.concatenate(taken), np.concatenate(rest)


def _first(labels: np.ndarray, pool: np.ndarray, num_classes: int, count: int) -> np.ndarray:
    """Return the first `count` images of every class in the pool's order."""
    return np.concatenate([pool[_of_class(labels, pool, label)[:count]] for label in range(num_classes)])


def _thin(labels: np.ndarray, pool: np.ndarray, num_classes: int, seed: int, counts: np.ndarray, name: str,
          reverse: bool = False) -> np.ndarray:
    """Shuffle every class and keep counts[c] images of it; `reverse` begins with the last class."""
    _enough(labels, pool, num_classes, counts, name)
    draw, kept = np.random.RandomState(seed), []
    for label in range(num_classes)[::-1] if reverse else range(num_classes):
        positions = _of_class(labels, pool, label)
        draw.shuffle(positions)
        kept.append(pool[positions[:counts[label]]])
    return np.concatenate(kept)


def _enough(labels: np.ndarray, pool: np.ndarray, num_classes: int, counts: np.ndarray, name: str) -> None:
    found = np.bincount(labels[pool], minlength=num_classes)
    short = np.flatnonzero(found < counts)
    if len(short):
        label = short[0]
        raise UserError(f"class {label} has {found[label]} images left for the {name} set, but {counts[label]} are "
                        "asked for; lower DATASET.*.NUM_LABELED_HEAD, NUM_UNLABELED_HEAD or DATASET.NUM_VALID")


def _nonempty(valid: np.ndarray, kept: np.ndarray, num_valid: int) -> None:
    if not len(valid) or not len(kept):
        raise UserError(f"DATASET.NUM_VALID {num_valid} leaves {len(kept)} training and {len(valid)} validation "
                        "images; choose a positive multiple of the number of classes, or 0 for none")
