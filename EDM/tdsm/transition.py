"""Transition matrices of label noise, and labels flipped by them: T[y, ỹ] = p(noisy label ỹ | clean label y),
row-stochastic, float64 [K, K].

Symmetric, class-to-class ("asymmetric") and any given matrix, as in "Label-Noise Robust Diffusion Models" (Na et al.,
ICLR 2024). Flips are drawn from NumPy's RandomState, as the published converter draws them after np.random.seed.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.cli import UserError, nearest
from shared.data.formats import CIFAR10, CIFAR100
from shared.data.safe import load_array

NOISE_TYPES = ("clean", "sym", "asym", "learn")

# For each fine class of CIFAR-100 the next one of its coarse class, in cyclic order.
CIFAR100_TARGETS = (
    51, 32, 11, 42, 30, 20, 7, 14, 13, 10, 16, 35, 17, 48, 18, 19, 28, 37, 24, 21, 25, 31, 39, 33, 6,
    84, 45, 29, 61, 44, 55, 38, 67, 49, 63, 46, 50, 68, 15, 40, 86, 69, 43, 88, 78, 77, 98, 52, 58, 60,
    65, 53, 56, 57, 62, 72, 59, 83, 90, 96, 71, 9, 70, 64, 66, 74, 75, 73, 76, 81, 82, 23, 95, 91, 80,
    34, 12, 79, 93, 99, 36, 85, 92, 0, 94, 89, 87, 22, 97, 41, 8, 1, 54, 27, 5, 4, 47, 3, 2, 26)
DIGIT_TARGETS = {2: 7, 3: 8, 5: 6, 6: 5}
# The targets of "asymmetric" noise by class; other classes keep their label. The digits are those of MNIST.
ASYM_TARGETS: dict[str, dict[int, int]] = {
    "mnist": DIGIT_TARGETS,
    "cifar100": dict(enumerate(CIFAR100_TARGETS)),
    "cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},  # truck, bird, deer, cat, dog
    "digits": DIGIT_TARGETS,
}
CLASSES = {"mnist": 10, "cifar100": 100, "cifar10": 10, "digits": 10}
ROW_SUM_TOLERANCE = 1e-3  # matrices are written with few digits
SHOWN_CLASSES = 20  # a matrix of more classes is printed in words
ARCHIVES = {CIFAR10.archive: "cifar10", CIFAR100.archive: "cifar100", "train-images-idx3-ubyte.gz": "mnist",
            "t10k-images-idx3-ubyte.gz": "mnist"}


def dataset_kind(path: str | os.PathLike) -> str | None:
    """Return the first key of CLASSES that occurs in the base name of `path`, or None."""
    name = os.path.basename(os.path.abspath(path)).lower()
    return next((kind for kind in CLASSES if kind in name), None)


def asym_targets(dataset: str | None) -> dict[int, int]:
    """Return clean class -> noisy class of "asymmetric" noise. Raises UserError for a data set that has none."""
    if dataset not in ASYM_TARGETS:
        found = "an unnamed data set" if dataset is None else f"{dataset}{nearest(dataset, ASYM_TARGETS)}"
        raise UserError(f"asymmetric noise is defined for {', '.join(ASYM_TARGETS)}, not for {found}; name the data "
                        "set (--dataset), or give the transition matrix as a file")
    return ASYM_TARGETS[dataset]


def check_rate(noise_rate: float | None, name: str = "--noise_rate") -> float:
    """Return the rate; raise UserError unless it is a number in [0, 1)."""
    if noise_rate is None or not 0 <= noise_rate < 1:
        raise UserError(f"{name}: expected a number of at least 0 and below 1, got {noise_rate}")
    return float(noise_rate)


def transition_matrix(noise_type: str, noise_rate: float, num_classes: int, dataset: str | None = None) -> np.ndarray:
    """Return T of a kind of noise: float64 [num_classes, num_classes].

    "clean": the identity. "sym": 1 - rate on the diagonal and rate / (K - 1) elsewhere. "asym": the classes of
    `asym_targets(dataset)` turn into their target at `noise_rate`. Raises UserError for a rate outside [0, 1), another
    type, or a number of classes that the data set's asymmetric noise is not defined for.
    """
    if num_classes < 1:
        raise UserError(f"a transition matrix needs classes, got {num_classes}")
    rate = check_rate(0.0 if noise_type == "clean" else noise_rate)
    match noise_type:
        case "clean":
            return np.eye(num_classes)
        case "sym":
            if num_classes == 1:
                raise UserError("symmetric noise needs at least 2 classes, got 1")
            matrix = np.full((num_classes, num_classes), rate / (num_classes - 1))
            np.fill_diagonal(matrix, 1 - rate)
            return matrix
        case "asym":
            targets = asym_targets(dataset)
            if num_classes != CLASSES[dataset]:
                raise UserError(f"asymmetric noise of {dataset} is defined for its {CLASSES[dataset]} classes, not for "
                                f"{num_classes}; give the transition matrix as a file")
            matrix = np.eye(num_classes)
            for clean, noisy in targets.items():
                matrix[clean, clean], matrix[clean, noisy] = 1 - rate, rate
            return matrix
    raise UserError(f"--noise_type: expected clean, sym or asym, got {noise_type!r}")


def realised_transition(clean: Sequence[int] | np.ndarray, noisy: Sequence[int] | np.ndarray,
                        num_classes: int) -> np.ndarray:
    """Return the fractions float64 [K, K] with which the labels `clean` became `noisy`; the identity's row for a class
    that does not occur."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (np.asarray(clean, np.int64), np.asarray(noisy, np.int64)), 1)
    totals = counts.sum(1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1), np.eye(num_classes))


def clean_posterior(matrix: np.ndarray) -> np.ndarray:
    """Return S[ỹ, y] = p(clean y | noisy ỹ), float64 [K, K], for equally frequent clean classes."""
    return (matrix / matrix.sum(0)).T


def check_transition(matrix: object, num_classes: int | None, name: str) -> np.ndarray:
    """Return `matrix` as float64 [K, K] with rows that sum to 1.

    Raises UserError, naming it `name`, when it is not square, not of `num_classes` (None: any), or not row-stochastic:
    entries outside [0, 1], or a row whose sum is off by more than ROW_SUM_TOLERANCE.
    """
    try:
        numbers = np.asarray(matrix)
    except ValueError:  # rows of different lengths
        numbers = np.array(None)
    if numbers.dtype.kind not in "iuf":
        raise UserError(f"{name}: expected a square table of numbers, its rows differ or hold something else")
    matrix = numbers.astype(np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        shape = " x ".join(map(str, matrix.shape)) or "a single number"
        raise UserError(f"{name}: a transition matrix is square, this one is {shape}")
    if num_classes is not None and len(matrix) != num_classes:
        raise UserError(f"{name}: transition matrix of {len(matrix)} classes, but the data has {num_classes}")
    bad = ~(np.isfinite(matrix) & (matrix >= 0) & (matrix <= 1 + ROW_SUM_TOLERANCE))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(f"{name}: not a transition matrix, its entry [{row}, {column}] is {matrix[row, column]:g}; "
                        "expected probabilities from 0 to 1")
    sums = matrix.sum(1)
    wrong = np.abs(sums - 1) > ROW_SUM_TOLERANCE
    if wrong.any():
        row = int(wrong.argmax())
        hint = "; it seems to be transposed (rows are the clean classes)" if np.allclose(matrix.sum(0), 1) else ""
        raise UserError(f"{name}: not a transition matrix, its row {row} sums to {sums[row]:g}, expected 1{hint}")
    return matrix / sums[:, None]


def load_transition(path: str | os.PathLike, num_classes: int | None = None) -> np.ndarray:
    """Read a transition matrix float64 [K, K] from .npy or .json: a list of rows, or an object that holds it under
    `transition_matrix` (as a dataset.json does). Raises UserError for a missing, damaged or unfit file."""
    name = os.fspath(path)
    try:
        if name.endswith(".npy"):
            content = load_array(name)
        elif name.endswith(".json"):
            with open(name, encoding="utf-8") as file:
                content = json.load(file)
        else:
            raise UserError(f"{name}: expected a transition matrix in a .json or .npy file")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{name}: damaged, or no transition matrix in its format") from None
    if isinstance(content, Mapping):
        if "transition_matrix" not in content:
            raise UserError(f"{name}: holds no entry transition_matrix")
        content = content["transition_matrix"]
    return check_transition(content, num_classes, name)


def check_labels(matrix: np.ndarray, labels: np.ndarray, name: str) -> None:
    """Raise UserError when a class occurs among the noisy `labels` (int [N]) that no clean class can become."""
    impossible = set(np.flatnonzero(matrix.sum(0) == 0).tolist()) & set(np.unique(labels).tolist())
    if impossible:
        raise UserError(f"{name}: the labels hold class {min(impossible)}, which its transition matrix makes "
                        "impossible (column of zeros); give the matrix of these labels")


def describe(matrix: np.ndarray) -> str:
    """Return a matrix in words, for the console: its diagonal and its largest entry beside it."""
    diagonal = np.diag(matrix)
    off = matrix - np.diag(diagonal)
    text = f"{len(matrix)} classes, diagonal {diagonal.min():.3f} to {diagonal.max():.3f}"
    if not off.max():
        return text
    row, column = np.unravel_index(off.argmax(), off.shape)
    return f"{text}, largest other entry {off[row, column]:.3f} ({row} becomes {column})"


# ------------------------------------------------------------------------------------------------- flipped labels

@dataclass(frozen=True)
class LabelNoise:
    """How labels are flipped.

    noise_type: "sym", "asym" or "matrix" (of the file `file`). rate: probability of a flip, None with a matrix.
    dataset: a key of CLASSES, None for others. matrix: float64 [K, K], with "matrix" only.
    """

    noise_type: str
    rate: float | None
    seed: int
    dataset: str | None = None
    matrix: np.ndarray | None = None
    file: str | None = None

    def num_classes(self, clean: np.ndarray) -> int:
        """Return the number of classes: of the matrix, of the data set, else the largest label plus one."""
        top = int(clean.max()) + 1
        known = len(self.matrix) if self.matrix is not None else CLASSES.get(self.dataset, top)
        if known < top:
            what = self.file if self.matrix is not None else f"--dataset={self.dataset}"
            raise UserError(f"{what} has {known} classes, but the images have a label {top - 1}")
        return known

    def transition_matrix(self, num_classes: int) -> np.ndarray:
        """Return the matrix that labels are drawn by, float64 [K, K]."""
        if self.matrix is not None:
            return self.matrix
        return transition_matrix(self.noise_type, self.rate, num_classes, self.dataset)

    def flip(self, clean: np.ndarray) -> np.ndarray:
        """Return the noisy labels int64 [N] of clean ones int64 [N], drawn one image after another.

        sym: a uniform draw for every image, and where it is below the rate another for which of the other classes.
        asym: a uniform draw for every image of a class that has a target. matrix: a uniform draw for every image,
        looked up in the cumulated row.
        """
        random, classes = np.random.RandomState(self.seed), self.num_classes(clean)
        matrix = self.transition_matrix(classes)
        noisy = np.array(clean, np.int64)
        if self.noise_type == "matrix":
            bounds = matrix.cumsum(1)
            for index, label in enumerate(clean):
                found = np.searchsorted(bounds[label], random.rand(), side="right")
                noisy[index] = min(found, np.flatnonzero(matrix[label]).max())  # rounding of the last bound
            return noisy
        targets = asym_targets(self.dataset) if self.noise_type == "asym" else {}
        for index, label in enumerate(clean.tolist()):
            if self.noise_type == "sym":
                if random.rand() < self.rate:
                    other = random.randint(0, classes - 1)
                    noisy[index] = other + (other >= label)
            elif label in targets and random.rand() < self.rate:
                noisy[index] = targets[label]
        return noisy

    def __call__(self, labels: list[tuple[str, Any]]) -> tuple[list[tuple[str, int]], dict[str, Any]]:
        """Return (name, noisy label) for (name, clean label), and further entries of dataset.json; print a summary."""
        if any(not isinstance(label, int) for _, label in labels):
            raise UserError("label noise needs a class number for every image; the source has images without, or "
                            "labels them by lists of numbers")
        names, clean = [name for name, _ in labels], np.array([label for _, label in labels], np.int64)
        noisy = self.flip(clean)
        classes = self.num_classes(clean)
        realised = realised_transition(clean, noisy, classes)
        flips = [[name, int(a), int(b)] for name, a, b in zip(names, clean, noisy, strict=True) if a != b]
        print("\n".join(self.summary(len(names), len(flips), realised)), flush=True)
        return list(zip(names, noisy.tolist(), strict=True)), {
            "clean_labels": [[name, int(label)] for name, label in zip(names, clean, strict=True)],
            "flips": flips,
            "transition_matrix": self.transition_matrix(classes).tolist(),
            "realised_transition_matrix": realised.tolist(),
            "label_noise": {"noise_type": self.noise_type, "noise_rate": self.rate, "seed": self.seed,
                            "dataset": self.dataset, "transition_file": self.file, "images": len(names),
                            "flipped": len(flips)}}

    def summary(self, images: int, flips: int, realised: np.ndarray) -> list[str]:
        kind = f"the matrix {self.file}" if self.matrix is not None else f"{self.noise_type} {self.rate:g}"
        lines = [f"label noise: {kind}, seed {self.seed}: {flips} of {images} labels flipped "
                 f"({100 * flips / images:.2f} %)"]
        if len(realised) > SHOWN_CLASSES:
            return [*lines, f"realised transition: {describe(realised)}"]
        width = 6  # of " 100.0"
        head = "clean\\noisy " + "".join(f"{label:>{width}}" for label in range(len(realised)))
        return [*lines, "realised transition matrix, in percent:", head,
                *(f"{label:>11} " + "".join(f"{100 * value:>{width}.1f}" for value in row)
                  for label, row in enumerate(realised))]


def plan_noise(noise_type: str | None, noise_rate: float | None, transition_file: str | None, dataset: str | None,
               seed: int | None, source: str, dest: str) -> LabelNoise | None:
    """Return the noise of the flags; None without.

    The data set is that of --dataset, else of the archive, else of the base name of `dest` or `source`. Raises
    UserError for contradicting flags, a rate outside [0, 1), an unfit matrix, and "asym" without a data set that
    defines it.
    """
    if noise_type is None and transition_file is None:
        given = {"--noise_rate": noise_rate, "--seed": seed, "--dataset": dataset}
        for flag, value in given.items():
            if value is not None:
                raise UserError(f"{flag} belongs to label noise: add --noise_type=sym, --noise_type=asym or "
                                "--transition=FILE")
        return None
    if dataset is not None and dataset not in CLASSES:
        raise UserError(f'--dataset: unknown data set "{dataset}"{nearest(dataset, CLASSES)}; known: '
                        f"{', '.join(CLASSES)}")
    name = Path(source).name
    kind = dataset or ARCHIVES.get(name) or dataset_kind(dest) or dataset_kind(source)
    if transition_file is not None:
        if noise_type is not None or noise_rate is not None:
            raise UserError("--transition says all about the noise; leave out --noise_type and --noise_rate")
        matrix = load_transition(transition_file)
        return LabelNoise("matrix", None, seed or 0, kind, matrix, str(transition_file))
    if noise_rate is None:
        raise UserError(f"--noise_type={noise_type} needs --noise_rate, the fraction of labels to flip, such as 0.4")
    rate = check_rate(noise_rate)
    if noise_type == "asym":
        asym_targets(kind)
    return LabelNoise(noise_type, rate, seed or 0, kind)
