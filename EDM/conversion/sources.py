"""The sources of dataset_tool.py: folders, ZIPs, npz, CIFAR and MNIST archives, LMDB, digits."""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.cli import UserError
from shared.data.classes import classes_by_folder, find_images, listed_labels, match_labels
from shared.data.datasets import load_dataset, training_classes
from shared.data.formats import CIFAR10, CIFAR100, Layout, read_batches, read_mnist
from shared.data.images import ImageSet, iterate, read_images
from shared.data.safe import Member
from shared.parallel import one_ahead
from shared.training.randomness import numpy_rng

DIGITS = "digits"  # scikit-learn's; no file
CIFAR = {layout.archive: layout for layout in (CIFAR10, CIFAR100)}
CIFAR_TRAIN, CIFAR_TEST = 50_000, 10_000
MNIST_TRAIN, MNIST_TEST = "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"
Label = int | list[float] | None
Item = tuple[Label, Member | bytes | np.ndarray]  # a source image: a file, its content, or pixels uint8 [C, H, W]


@dataclass(frozen=True)
class Part:
    """One of two parts of a source: "train", or "test", which gets `fraction` of every class, drawn by `seed`."""

    name: str
    fraction: float
    seed: int

    def indices(self, labels: Sequence[Label], source: Path) -> np.ndarray:
        """Return the positions of this part's images, int64, in their order; UserError for a class too small."""
        if not labels or not all(isinstance(label, int) for label in labels):
            raise UserError(f"--test-fraction: {source} has images without a class; sort them into folders, or list "
                            "them in labels.csv")
        numbers, test = np.array(labels), []
        for label in np.unique(numbers):
            members = np.flatnonzero(numbers == label)
            count = max(1, round(self.fraction * len(members)))
            if count >= len(members):
                raise UserError(f"--test-fraction={self.fraction:g}: class {label} has {len(members)} image(s), too "
                                "few for a training and a test set")
            test.append(numpy_rng(self.seed, int(label), "test images").permutation(members)[:count])
        chosen = np.isin(np.arange(len(numbers)), np.concatenate(test))
        return np.flatnonzero(chosen if self.name == "test" else ~chosen)


@dataclass(frozen=True)
class Source:
    """Images with their labels, as a stream. total: their number. classes: names in label order; () for numbers."""

    total: int
    items: Iterator[Item]
    classes: tuple[str, ...] = ()


def open_source(source: Path, test_split: bool, table: Path | None = None, part: Part | None = None) -> Source:
    """Open a source of dataset_tool.py. table: a CSV of labels. part: take a part of it alone. Raises UserError."""
    if source.is_dir() and source.name.endswith("_lmdb"):
        return _from_lmdb(source)
    if source.is_dir() or source.suffix.lower() == ".zip":
        return _from_files(source, table, part)
    if is_digits(source):
        return _from_set(load_dataset(DIGITS, "test" if test_split else "train"), source, part)
    if source.suffix.lower() == ".npz":
        return _from_set(read_images(source), source, part)
    if part is not None:
        raise UserError(f"--test-fraction divides a folder, .zip, .npz or {DIGITS}; {source} has test images of its "
                        "own (--eval)")
    if source.name in CIFAR:
        return _from_cifar(source, CIFAR[source.name], test_split)
    if source.name in (MNIST_TRAIN, MNIST_TEST):
        images, numbers = read_mnist(source, mnist_labels(source))
        if source.name == MNIST_TRAIN:
            _check_classes(source, numbers, 10)
        return Source(len(images), _from_pixels([(images, numbers)]))
    raise UserError(f"{source}: Unknown archive type; expected a folder, a .zip, an .npz, {', '.join(CIFAR)}, "
                    f"{MNIST_TRAIN} or {MNIST_TEST}")


def is_digits(source: str | os.PathLike) -> bool:
    return os.fspath(source) == DIGITS and not os.path.exists(source)


def _from_files(source: Path, table: Path | None, part: Part | None) -> Source:
    files = find_images(source, table=table)
    files.warn()
    if not files.members:
        raise UserError(f"{source}: No image files found in the specified path")
    labels: list[Label] | None = listed_labels(files)
    classes = files.classes
    if labels is None:
        labels, classes = _folder_labels(source, files.names)
    labels, classes = _numbered_as_training(source, labels, classes)
    order = np.arange(len(files)) if part is None else part.indices(labels, source)
    if source.is_dir():  # in order of the folder names, where a ZIP keeps that of the whole names
        order = sorted(order.tolist(), key=lambda i: files.members[i].name.split("/"))
    return Source(len(order), ((labels[i], files.members[i]) for i in order), classes)


def _folder_labels(source: Path, names: Sequence[str]) -> tuple[list[Label], tuple[str, ...]]:
    """Return the classes of images by their top-level folders, if these are at least two, and their names.

    Files beside the folders are a class of their own, as in the published converter.
    """
    found = classes_by_folder(names, source, loose=True)
    if found is None or len(set(found.labels.tolist())) < 2:
        return [None] * len(names), ()
    return found.labels.tolist(), tuple(name or "." for name in found.names)


def _numbered_as_training(source: Path, labels: list[Label], classes: tuple[str, ...]
                          ) -> tuple[list[Label], tuple[str, ...]]:
    """Return labels and classes, numbered as in the training set if `source` is the test set beside it."""
    known = training_classes(source) if classes else ()
    if not known or known == classes:
        return labels, classes
    numbers = np.array([-1 if label is None else label for label in labels])
    matched = match_labels(numbers, classes, known, source).tolist()
    return [None if label < 0 else label for label in matched], known


def _from_set(images: ImageSet, source: Path, part: Part | None) -> Source:
    if part is not None:
        images = images.subset(part.indices(images.labels.tolist(), source))
    return Source(len(images), _from_pixels(iterate(images)), images.classes)


def _from_pixels(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Item]:
    for images, numbers in parts:
        yield from zip((None if number < 0 else number for number in numbers.tolist()), np.array(images), strict=True)


def _from_cifar(source: Path, layout: Layout, test_split: bool) -> Source:
    names, expected = (layout.test, CIFAR_TEST) if test_split else (layout.train, CIFAR_TRAIN)
    batches = list(one_ahead(read_batches(source, layout, names)))
    numbers = np.concatenate([labels for _, labels in batches])
    if len(numbers) != expected:
        warnings.warn(f"{source}: {len(numbers)} images in place of {expected}", stacklevel=2)
    if not test_split:
        _check_classes(source, numbers, layout.num_classes)
    return Source(len(numbers), _from_pixels(batches))


def _check_classes(source: Path, numbers: np.ndarray, num_classes: int) -> None:
    """Check a training archive, also where --max-images takes a part of it: the label input of a network is as wide as
    its largest label demands."""
    absent = np.flatnonzero(np.bincount(numbers, minlength=num_classes) == 0).tolist()
    text = f"{source}: no image of class {', '.join(map(str, absent))}"
    if {0, num_classes - 1} & set(absent):
        raise UserError(f"{text}; expected labels from 0 to {num_classes - 1}. Give its images as a folder or .npz, "
                        "which may lack classes")
    if absent:
        warnings.warn(text, stacklevel=2)


def mnist_labels(source: Path) -> Path:
    """Return the file of labels beside MNIST's images; UserError without it."""
    labels = source.with_name(source.name.replace("-images-idx3-", "-labels-idx1-"))
    if source.exists() and not labels.exists():
        raise UserError(f"Missing input file or directory: {labels}")
    return labels


def _from_lmdb(source: Path) -> Source:
    try:
        import lmdb  # an optional package
    except ImportError:
        raise UserError(f"{source}: reading LMDB needs the package lmdb: pip install lmdb") from None
    try:
        environment = lmdb.open(str(source), readonly=True, lock=False)
    except lmdb.Error as error:
        raise UserError(f"{source}: not a readable LMDB ({error})") from None

    def values() -> Iterator[Item]:
        with environment.begin(buffers=False) as transaction:
            for _, value in transaction.cursor():
                yield None, value

    return Source(environment.stat()["entries"], values())
