"""Wrong labels on purpose: class-conditional noise with a known transition matrix, for experiments that need one.

The draws are those of "Label-Noise Robust Diffusion Models" (Na et al., ICLR 2024), from NumPy's RandomState: the same
seed flips the same labels as the published converter would after np.random.seed. Beside the noisy labels the written
set keeps, under keys of dataset.json that readers of labels pass over, the clean labels, the flips, the transition
matrix and the one that was realised.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from EDM.tdsm import transition
from EDM.tdsm.noisy_set import clean_labels
from shared.cli import UserError, nearest
from shared.data.cifar import CIFAR10, CIFAR100
from shared.data.images import ImageSet

SHOWN_CLASSES = 20  # a matrix of more classes is printed in words
ARCHIVES = {CIFAR10.archive: "cifar10", CIFAR100.archive: "cifar100", "train-images-idx3-ubyte.gz": "mnist",
            "t10k-images-idx3-ubyte.gz": "mnist"}


@dataclass(frozen=True)
class LabelNoise:
    """How labels are flipped.

    noise_type: "sym", "asym" or "matrix" (of the file `file`). rate: probability of a flip, None with a matrix.
    dataset: a key of transition.CLASSES, None for others. matrix: float64 [K, K], with "matrix" only.
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
        known = len(self.matrix) if self.matrix is not None else transition.CLASSES.get(self.dataset, top)
        if known < top:
            what = self.file if self.matrix is not None else f"--dataset={self.dataset}"
            raise UserError(f"{what} has {known} classes, but the images have a label {top - 1}")
        return known

    def transition_matrix(self, num_classes: int) -> np.ndarray:
        """Return the matrix that labels are drawn by, float64 [K, K]."""
        if self.matrix is not None:
            return self.matrix
        return transition.transition_matrix(self.noise_type, self.rate, num_classes, self.dataset)

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
        targets = transition.asym_targets(self.dataset) if self.noise_type == "asym" else {}
        for index, label in enumerate(clean.tolist()):
            if self.noise_type == "sym":
                if random.rand() < self.rate:
                    other = random.randint(0, classes - 1)
                    noisy[index] = other + (other >= label)
            elif label in targets and random.rand() < self.rate:
                noisy[index] = targets[label]
        return noisy

    def __call__(self, labels: list[tuple[str, Any]]) -> tuple[list[tuple[str, int]], dict[str, Any]]:
        """Return (name, noisy label) for (name, clean label), and what dataset.json keeps besides; print a summary."""
        if any(not isinstance(label, int) for _, label in labels):
            raise UserError("label noise needs a class number for every image; the source has images without, or "
                            "labels them by lists of numbers")
        names, clean = [name for name, _ in labels], np.array([label for _, label in labels], np.int64)
        noisy = self.flip(clean)
        classes = self.num_classes(clean)
        realised = transition.realised_transition(clean, noisy, classes)
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
            return [*lines, f"realised transition: {transition.describe(realised)}"]
        width = 6  # of " 100.0"
        head = "clean\\noisy " + "".join(f"{label:>{width}}" for label in range(len(realised)))
        return [*lines, "realised transition matrix, in percent:", head,
                *(f"{label:>11} " + "".join(f"{100 * value:>{width}.1f}" for value in row)
                  for label, row in enumerate(realised))]


def plan_noise(noise_type: str | None, noise_rate: float | None, transition_file: str | None, dataset: str | None,
               seed: int | None, source: str, dest: str) -> LabelNoise | None:
    """Return the noise that the flags ask for; None where they ask for none.

    The data set is what --dataset says, else what the archive is, else what occurs in the base name of `dest` or
    `source`. Raises UserError for flags that contradict each other, a rate outside [0, 1), an unfit matrix, and
    "asym" without a data set that defines it.
    """
    if noise_type is None and transition_file is None:
        given = {"--noise_rate": noise_rate, "--seed": seed, "--dataset": dataset}
        for flag, value in given.items():
            if value is not None:
                raise UserError(f"{flag} belongs to label noise: add --noise_type=sym, --noise_type=asym or "
                                "--transition=FILE")
        return None
    if dataset is not None and dataset not in transition.CLASSES:
        raise UserError(f'--dataset: unknown data set "{dataset}"{nearest(dataset, transition.CLASSES)}; known: '
                        f"{', '.join(transition.CLASSES)}")
    name = Path(source).name
    kind = dataset or ARCHIVES.get(name) or transition.dataset_kind(dest) or transition.dataset_kind(source)
    if transition_file is not None:
        if noise_type is not None or noise_rate is not None:
            raise UserError("--transition says all about the noise; leave out --noise_type and --noise_rate")
        matrix = transition.load_transition(transition_file)
        return LabelNoise("matrix", None, seed or 0, kind, matrix, str(transition_file))
    if noise_rate is None:
        raise UserError(f"--noise_type={noise_type} needs --noise_rate, the share of labels to flip, such as 0.4")
    rate = transition.check_rate(noise_rate)
    if noise_type == "asym":
        transition.asym_targets(kind)
    return LabelNoise(noise_type, rate, seed or 0, kind)


def with_clean_labels(images: ImageSet, path: str) -> ImageSet:
    """Return the set read from `path` with the clean labels that its dataset.json keeps; itself where it keeps none."""
    labels = clean_labels(path)
    if labels is None:
        return images
    classes = tuple(map(str, range(max(int(labels.max()) + 1, images.num_classes))))
    return ImageSet(images.images, labels, classes, images.name)
