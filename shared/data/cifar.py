"""CIFAR's pickled batches and MNIST's idx files, read in place from their folder or archive."""
from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shared.cli import UserError
from shared.data.archives import read_gzip, read_tar
from shared.data.pickles import load_numpy_pickle

SIDE = 32
ROW = 3 * SIDE * SIDE  # bytes of an image: its red, green and blue plane


class Layout(NamedTuple):
    """How one of the two data sets lies on disk."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str             # key of the labels in a batch
    label_names: str        # key of their names in `meta`
    num_classes: int


CIFAR10 = Layout("cifar-10-batches-py", "cifar-10-python.tar.gz", tuple(f"data_batch_{k}" for k in range(1, 6)),
                 ("test_batch",), "batches.meta", "labels", "label_names", 10)
CIFAR100 = Layout("cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "meta", "fine_labels",
                  "fine_label_names", 100)
# MD5 of the published files.
PUBLISHED = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}


def layout_of(path: Path) -> Layout | None:
    """Return which CIFAR the folder or archive is, or None."""
    for layout in (CIFAR10, CIFAR100):
        if path.name == layout.archive and path.is_file() or (path / layout.train[0]).is_file() and path.is_dir():
            return layout
    return None


def read_batches(path: Path, layout: Layout, names: Sequence[str],
                 altered: list[str] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (images uint8 [n, 3, 32, 32], labels int64 [n]) for each named batch, in that order.

    `path`: the folder of batches, or the published archive, which is read in one pass. `altered`, if given, gets the
    names of the batches that are not the published ones. Raises UserError for a missing, damaged or hostile batch and
    for labels beyond the classes.
    """
    for name, data in _contents(path, layout, names):
        if altered is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != PUBLISHED.get(name):
            altered.append(name)
        yield _batch(load_numpy_pickle(data, f"{path}/{name}"), layout, f"{path}/{name}")


def class_names(path: Path, layout: Layout) -> tuple[str, ...]:
    """Return the class names of the folder's or archive's meta file, or '0', '1', ... without one."""
    for name, data in _contents(path, layout, [layout.meta], required=False):
        content = load_numpy_pickle(data, f"{path}/{name}")
        names = content.get(layout.label_names) if isinstance(content, dict) else None
        if isinstance(names, list) and len(names) == layout.num_classes:
            return tuple(map(str, names))
        raise UserError(f"{path}/{name}: expected {layout.num_classes} class names under {layout.label_names!r}")
    return tuple(str(c) for c in range(layout.num_classes))


def _contents(path: Path, layout: Layout, names: Sequence[str], required: bool = True) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                yield name, read_gzip(path / name)
            elif required:
                raise UserError(f"{path}: {name} is missing")
        return
    waiting, ahead = list(names), {}
    for entry, data in read_tar(path, {f"{layout.folder}/{name}" for name in names}):
        ahead[entry.rpartition("/")[2]] = data
        while waiting and waiting[0] in ahead:  # the published archive has them in another order
            yield waiting[0], ahead.pop(waiting.pop(0))
        if not waiting:
            return
    if waiting and required:
        raise UserError(f"{path}: {layout.folder}/{waiting[0]} is missing")


def _batch(content: object, layout: Layout, source: str) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(content, dict) or not {"data", layout.labels} <= content.keys():
        raise UserError(f"{source}: expected a dictionary with `data` and `{layout.labels}`")
    data, labels = content["data"], content[layout.labels]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != ROW:
        raise UserError(f"{source}: `data` must be uint8 [n, {ROW}]")
    if not isinstance(labels, (list, np.ndarray)) or len(labels) != len(data) or not len(data):
        raise UserError(f"{source}: expected as many `{layout.labels}` as images ({len(data)})")
    numbers = np.asarray(labels)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= layout.num_classes:
        raise UserError(f"{source}: `{layout.labels}` must be integers from 0 to {layout.num_classes - 1}")
    return data.reshape(-1, 3, SIDE, SIDE), numbers.astype(np.int64)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the uint8 array of an idx file (.gz or not) with that many dimensions, as MNIST publishes them."""
    data = read_gzip(path)
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path}: not an idx file of bytes with {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) != header + math.prod(shape):
        raise UserError(f"{path}: cut short, expected {header + math.prod(shape)} bytes unpacked, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_mnist(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint8 [N, 1, 32, 32], int64 [N]); the 28x28 digits with two black pixels on each side."""
    pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
    if pixels.shape[1:] != (28, 28) or len(pixels) != len(numbers) or not len(pixels) or numbers.max() > 9:
        raise UserError(f"{images}: expected 28x28 images and as many labels from 0 to 9 in {labels.name}, got "
                        f"{list(pixels.shape)} and {len(numbers)}")
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None], numbers.astype(np.int64)
