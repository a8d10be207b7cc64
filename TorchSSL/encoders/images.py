"""Images by position, with their names and labels, read as they are needed: sets of any size in little memory."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from shared.cli import UserError, nearest
from shared.data.classes import ImageFiles, find_images, in_order
from shared.data.datasets import NAMES, load_dataset, own_part
from shared.data.formats import layout_of
from shared.data.images import ImageSet, UnequalSizes, open_image, read_images
from shared.data.photographs import PhotographSet, list_imagenet
from shared.data.safe import Member, load_array, read_members
from shared.training.fingerprint import fingerprint, fingerprint_arrays, fingerprint_files
from TorchSSL.core.data import load_pools
from TorchSSL.encoders.features import read_features


class Images:
    """Images in an array, or in the files of a folder or ZIP.

    path: of the folder, ZIP or array. names: of the files, relative to the folder or ZIP, or positions in an array.
    labels: int64 [N], -1 unknown. classes: names in label order.
    """

    def __init__(self, path: str | Path, labels: np.ndarray, classes: Sequence[str], array: np.ndarray | None = None,
                 files: ImageFiles | None = None) -> None:
        self.path, self.labels, self.classes = Path(path), labels, tuple(classes)
        self.array, self.files = array, files
        self.names = files.names if files is not None else list(map(str, range(len(labels))))

    def __len__(self) -> int:
        return len(self.names)

    def read(self, positions: Sequence[int]) -> Iterator[bytes | np.ndarray]:
        """Yield each image as stored: an encoded file, or uint8 [C, H, W]."""
        if self.files is None:
            yield from (self.array[position] for position in positions)
        else:
            yield from read_members(self.files.path, [self.files.members[position] for position in positions])

    def decode(self, content: bytes | np.ndarray, position: int) -> Image.Image:
        """Return an image of `read` in mode L or RGB; UserError if it is not an image."""
        if isinstance(content, bytes):
            return open_image(content, f"{self.files.path}/{self.names[position]}")
        return Image.fromarray(content[0] if len(content) == 1 else content.transpose(1, 2, 0))

    def size(self) -> tuple[int, int]:
        """Return width and height of the first image."""
        return self.decode(next(self.read([0])), 0).size

    @cached_property
    def fingerprint(self) -> str:
        """Digest of images, names, labels and classes."""
        if self.files is None:
            return fingerprint_arrays(self.array, self.labels, self.classes)
        root = self.files.path
        content = fingerprint_files(root, self.names) if root.is_dir() else fingerprint(root)
        return fingerprint_arrays([content], self.names, self.labels, self.classes)

    def as_set(self) -> ImageSet | PhotographSet:
        """Return them as a set: decoded if they are small and of one size, else as photographs; UserError."""
        if self.array is not None:
            return ImageSet(self.array, self.labels, self.classes, self.path.name)
        root = self.files.path
        if not root.is_dir():
            raise UserError(f"{root}: unpack the ZIP; photographs are read from a folder")
        return PhotographSet(np.array([f"{root}/{name}" for name in self.names]), self.labels, self.classes, root.name,
                             str(root))


def list_images(path: str) -> Images:
    """Return all images of a folder, ZIP or npz in the order of their names, without labels; UserError."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"there is no {path}; expected a folder, ZIP or npz of images")
    if place.suffix.lower() == ".npz" and place.is_file():
        found = read_images(place)
        return Images(path, np.full(len(found), -1), (), array=found.images)
    files = find_images(place)
    files.warn()
    if not files.members:
        raise UserError(f"{path} holds no images")
    return Images(path, np.full(len(files), -1), (), files=files)


def training_images(dataset: str, data_dir: str = "./data", download: bool = False, small: int = 64) -> Images:
    """Return the images that labels are drawn from, in the order in which trainers count them; UserError.

    dataset: as of a trainer. small: own images whose larger side is longer stay files and are not decoded.
    """
    if dataset == "imagenet":
        found = list_imagenet(data_dir, "train")
        files = ImageFiles(Path(found.root), tuple(map(Member, found.names)), {})
        return Images(found.root, found.labels, found.classes, files=files)
    if dataset in NAMES:
        found = load_pools(dataset, data_dir, download)[0]
        return Images(dataset, found.labels, found.classes, array=found.images)
    images = own_images(dataset, "train")
    if images.array is None and max(images.size()) <= small:
        try:
            images.array = load_dataset(dataset, "train").images
        except UnequalSizes:
            images.array = None
    return images


def own_images(dataset: str, split: str) -> Images:
    """Return a split of the user's own images in the order of `load_dataset`; files are not decoded. UserError."""
    path = Path(dataset)
    if not path.exists():
        raise UserError(f"--dataset {dataset}: neither a data set ({', '.join(NAMES)}) nor a folder or file"
                        f"{nearest(dataset, NAMES)}")
    part, prefix = (path, "") if layout_of(path) is not None else own_part(path, split)
    if part.suffix.lower() == ".npz" or layout_of(path) is not None:
        found = load_dataset(dataset, split)
        return Images(dataset, found.labels, found.classes, array=found.images)
    files = find_images(part, prefix)
    files.warn()
    if not files.members:
        raise UserError(f"{part} holds no images")
    files, found = in_order(files, prefix)
    labels, classes = (np.full(len(files), -1), ()) if found is None else found
    return Images(part, labels, classes, files=files)


def features_in(file: str, images: Images) -> np.ndarray:
    """Read features [N, D] of a .npy, .npz or an encoder's file, the latter matched by name; UserError."""
    if Path(file).suffix in (".npy", ".npz"):
        found = load_array(file, f"--features {file}", ("features", "embs"))
        if found.ndim != 2 or found.dtype.kind != "f" or len(found) != len(images):
            raise UserError(f"--features: {file} holds {found.dtype} {list(found.shape)}, expected floats "
                            f"[{len(images)}, D], a row an image")
        return found.astype(np.float32)
    stored = read_features(file)
    rows = {name: row for row, name in enumerate(stored.names)}
    if absent := [name for name in images.names if name not in rows]:
        raise UserError(f"--features: {file} has no row for {absent[0]} of {images.path}")
    return unit_length(stored.values[[rows[name] for name in images.names]])


def unit_length(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
