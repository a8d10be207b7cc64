"""The file formats of published data sets, read in place: CIFAR's pickled batches, MNIST's idx files, MATLAB 5, npz."""
from __future__ import annotations

import hashlib
import math
import pickle
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from shared.cli import UserError
from shared.data.cache import Allocate, Stored
from shared.data.classes import MAX_CLASSES, class_numbers
from shared.data.safe import MAX_ARRAY_BYTES, READ_ERRORS, SMALL, load_numpy_pickle, read_gzip, read_tar, zip_members

CIFAR_SIDE = 32
CIFAR_ROW = 3 * CIFAR_SIDE**2  # bytes of an image: its red, green and blue plane
MAT_TYPES = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAT_RATIO = 10                 # unpacked to packed; SVHN has 1.3
ROWS = 256                     # images that are copied at a time
# Names of (images, labels) in npz files: ours first, then those of Keras, MedMNIST and others.
NPZ_WHOLE = (("images", "labels"), ("arr_0", "arr_1"))
NPZ_SPLIT = {split: tuple((image.format(name), label.format(name)) for name in names for image, label in
                          (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("X_{}", "Y_{}"), ("X_{}", "y_{}"),
                           ("{}_x", "{}_y")))
             for split, names in (("train", ("train",)), ("test", ("test", "val", "valid")),
                                  ("unlabeled", ("unlabeled",)))}


class Layout(NamedTuple):
    """How CIFAR-10 or CIFAR-100 lies on disk."""

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


# --------------------------------------------------------------------------------------------------------------- CIFAR

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
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != CIFAR_ROW:
        raise UserError(f"{source}: `data` must be uint8 [n, {CIFAR_ROW}]")
    if not isinstance(labels, (list, np.ndarray)) or len(labels) != len(data) or not len(data):
        raise UserError(f"{source}: expected as many `{layout.labels}` as images ({len(data)})")
    numbers = np.asarray(labels)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= layout.num_classes:
        raise UserError(f"{source}: `{layout.labels}` must be integers from 0 to {layout.num_classes - 1}")
    return data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE), numbers.astype(np.int64)


def cifar_batches(images: np.ndarray, labels: np.ndarray, names: Sequence[str], layout: Layout) -> Iterator[
        tuple[str, bytes]]:
    """Yield (name, content) of CIFAR batches: equal shares of images uint8 [N, 3, 32, 32] with int64 labels."""
    for name, rows in zip(names, np.array_split(np.arange(len(images)), len(names)), strict=True):
        data = np.ascontiguousarray(images[rows[0]:rows[-1] + 1]).reshape(len(rows), -1)
        yield name, pickle.dumps({"data": data, layout.labels: labels[rows]}, protocol=4)


# ------------------------------------------------------------------------------------------------------- MNIST, MATLAB

def read_mnist(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint8 [N, 1, 32, 32], int64 [N]); the 28x28 digits with two black pixels on each side."""
    pixels, numbers = _read_idx(images, 3), _read_idx(labels, 1)
    if pixels.shape[1:] != (28, 28) or len(pixels) != len(numbers) or not len(pixels) or numbers.max() > 9:
        raise UserError(f"{images}: expected 28x28 images and as many labels from 0 to 9 in {labels.name}, got "
                        f"{list(pixels.shape)} and {len(numbers)}")
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None], numbers.astype(np.int64)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the uint8 array of an idx file (.gz or not) with that many dimensions."""
    data = read_gzip(path)
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path}: not an idx file of bytes with {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) != header + math.prod(shape):
        raise UserError(f"{path}: cut short, expected {header + math.prod(shape)} bytes unpacked, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_mat(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the `wanted` numeric arrays of a MATLAB 5 file, in the types in which they are stored.

    Written from MathWorks' description of the format: scipy's reader crashes on unknown type codes in a damaged file.
    Raises UserError for such a file, and for one that unfolds to more than 10 times its size.
    """
    found: dict[str, np.ndarray] = {}
    try:
        data = np.memmap(path, np.uint8, "r")
        if bytes(data[124:128]) != b"\0\1IM":
            raise ValueError("no header of MATLAB 5")
        for kind, element in _mat_elements(memoryview(data)[128:]):
            if kind == MAT_COMPRESSED:
                content = _inflate(element, max(SMALL, MAT_RATIO * len(data)))
                kind, element = next(_mat_elements(content))
            if kind != MAT_MATRIX:
                continue
            _, shape, name, values, *_ = (_mat_numbers(*part) for part in _mat_elements(element))
            found[name.tobytes().decode("ascii")] = values.reshape(shape, order="F")
        return {name: found[name] for name in wanted}
    except (*READ_ERRORS, KeyError, TypeError, OverflowError, StopIteration) as error:
        raise UserError(f"{path}: cut short or not a MATLAB 5 file with {' and '.join(wanted)} ({error}); get it again"
                        ) from None


def _mat_elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (type code, content) of consecutive elements; those of up to 4 bytes lie in place of their size."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack("<II", data[place:place + 8])
        start, end = place + 8, place + 8 + size
        if kind >> 16:
            kind, start, end = kind & 0xFFFF, place + 4, place + 4 + (kind >> 16)
            place += 8
        else:
            place = end if kind == MAT_COMPRESSED else end + -size % 8
        if end > len(data):
            raise EOFError("cut short")
        yield kind, data[start:end]


def _mat_numbers(kind: int, content: memoryview) -> np.ndarray:
    return np.frombuffer(content, MAT_TYPES[kind])


def _inflate(packed: memoryview, limit: int) -> memoryview:
    """Return the unpacked content, piece by piece, since SVHN's largest file holds 1.6 GB."""
    inflate, content = zlib.decompressobj(), bytearray()
    for start in range(0, len(packed), SMALL):
        content += inflate.decompress(packed[start:start + SMALL], limit + 1 - len(content))
        if len(content) > limit:
            raise ValueError(f"it unfolds to more than {limit} bytes")
    if not inflate.eof:
        raise EOFError("cut short")
    return memoryview(content)


# ------------------------------------------------------------------------------------------------------------- npz

def npz_arrays(path: Path, split: str = "") -> tuple[str, str] | None:
    """Return the names of the arrays of images and labels in an npz: of a split of its own ("train", "test"), else of
    the whole set; None if it has none. A file with splits has no whole set but its training images."""
    names = {member.name.removesuffix(".npy") for member in zip_members(path, max_member=MAX_ARRAY_BYTES)}
    divided = any(pair[0] in names for pairs in NPZ_SPLIT.values() for pair in pairs)
    pairs = NPZ_SPLIT.get(split or "train", ()) if divided else NPZ_WHOLE if split in ("", "train") else ()
    images = [pair for pair in pairs if pair[0] in names]
    return next((pair for pair in images if pair[1] in names), images[0] if images else None)


def npz_classes(path: Path) -> tuple[str, ...]:
    """Return the names of the classes in an npz, if it holds any; UserError for a damaged file."""
    if not any(member.name == "classes.npy" for member in zip_members(path, max_member=MAX_ARRAY_BYTES)):
        return ()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return tuple(str(name) for name in arrays["classes"])
    except (*READ_ERRORS, MemoryError, TypeError) as error:
        raise UserError(f"{path}: cut short or not plain arrays ({error})") from None


def read_npz(path: Path, split: str, allocate: Allocate) -> Stored:
    """Read images uint8 [N, C, H, W], [N, H, W, C] or gray [N, H, W], labels [N] or [N, 1] (integers, or names), and
    `classes`, if known. Raises UserError for other arrays."""
    pair = npz_arrays(path, split)
    if pair is None:
        names = [member.name.removesuffix(".npy") for member in zip_members(path, max_member=MAX_ARRAY_BYTES)]
        raise UserError(f"{path}: expected an array `images`, uint8 [N, C, H, W], or x_train or train_images; it holds "
                        f"{', '.join(names) or 'nothing'}")
    image, label = pair
    try:
        with np.load(path, allow_pickle=False) as arrays, arrays.zip.open(f"{image}.npy") as stream:
            size = arrays.zip.getinfo(f"{image}.npy").file_size
            images = _stream_images(f"{path}: `{image}`", stream, size, allocate)
            labels = arrays[label] if label in arrays else np.full(len(images), -1)
            classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    except (*READ_ERRORS, MemoryError, TypeError) as error:
        raise UserError(f"{path}: cut short or not plain arrays ({error})") from None
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels.dtype.kind == "U" and labels.shape == (len(images),):
        numbers = class_numbers(set(labels.tolist()), path)
        classes = classes or list(numbers)
        labels = np.array([numbers[name] for name in labels.tolist()], np.int64)
    known = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not known or not -1 <= int(labels.min()) <= int(labels.max()) < MAX_CLASSES:
        raise UserError(f"{path}: `{label}` must be {len(images)} integers from -1 on, got {labels.dtype} "
                        f"{list(labels.shape)}")
    count = int(labels.max()) + 1
    if classes is not None and len(classes) < count:
        raise UserError(f"{path}: {len(classes)} `classes` but a label {count - 1}")
    return Stored(images, labels.astype(np.int64), tuple(classes or map(str, range(count))))


def _stream_images(source: str, stream: IO[bytes], size: int, allocate: Allocate) -> np.ndarray:
    """Copy the array of an .npy stream of `size` bytes a chunk at a time."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    stored, fortran, dtype = read_header[np.lib.format.read_magic(stream)](stream)
    shape = (stored[0], 1, *stored[1:]) if len(stored) == 3 else stored
    if len(shape) != 4 or dtype != np.uint8 or fortran or not shape[0] or not {1, 3} & {shape[1], shape[3]}:
        raise UserError(f"{source} must be uint8 [N, 1 or 3, H, W], [N, H, W, 1 or 3] or [N, H, W] in C order, got "
                        f"{dtype} {list(stored)}")
    if math.prod(shape) > size:
        raise UserError(f"{source} is cut short, it should be {list(stored)}")
    last = shape[1] not in (1, 3)  # channels last
    array = allocate((shape[0], shape[3], *shape[1:3]) if last else shape)
    for start in range(0, len(array), ROWS):
        count = min(ROWS, len(array) - start)
        data = stream.read(count * math.prod(shape[1:]))
        chunk = np.frombuffer(data, np.uint8).reshape(count, *shape[1:])
        array[start:start + count] = chunk.transpose(0, 3, 1, 2) if last else chunk
    return array
