"""Photographs that do not fit in memory: encoded images by position, from record files or folders.

A photograph that cannot be read or decoded ends in a UserError that names it; with `skip_bad` the next good one stands
in for it, the same at every pass, and `bad` counts it.
"""
from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from shared.cli import UserError
from shared.data.classes import FolderClasses, class_folders, find_images, labels_of, match_labels
from shared.data.images import EXIF_ORIENTATION, open_image
from shared.training.fingerprint import fingerprint_arrays, fingerprint_files

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB, unit scale
TRAIN_SIDE, EVAL_SIDE = 256, 224  # of a training image before its crop; of one that is evaluated, and of the crop
Decoded = TypeVar("Decoded")


class View(Protocol):
    """A resized and cropped photograph, uint8 [size, size, 3]. side: of the shorter side before a central crop."""


    size: int
    side: int | None

    def __call__(self, image: Image.Image, crops: Any, number: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Request:
    """Which photographs, int64 [n], and for random views how to crop them.

    crops: has `flip`, bool [n], and `window(number, height, width)`, which returns (top, left, height, width) of the
    part of image `number` that is shown.
    """

    positions: np.ndarray
    crops: Any = None


@dataclass(frozen=True)
class Photograph:
    """An encoded image, its label and its position. stands_in: for one that cannot be read."""

    payload: bytes
    label: int
    position: int
    stands_in: bool = False


class Photographs:
    """Photographs by position, each with a label in 0..num_classes-1.

    files: encoded images: has a length, `name(position)` and `get(position)`, which returns (content, label).
    skip_bad: None: the program has no flag for it. `bad`: position -> why it cannot be used; filled as they are met,
    with skip_bad. Safe to be read by many threads.
    """

    def __init__(self, files: Any, num_classes: int, skip_bad: bool | None = None) -> None:
        self.files, self.num_classes, self.skip_bad = files, num_classes, skip_bad
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.files)

    def get(self, position: int, decode: Callable[[bytes, str], Decoded]) -> tuple[Decoded, Photograph]:
        """Return the photograph at a position, or the next good one, and the result of `decode` on content and name.

        Raises UserError if none can be used, and at the first bad one without skip_bad.
        """
        for offset in range(len(self)):
            here = (position + offset) % len(self)
            if here in self.bad:
                continue
            try:
                payload, label = self.files.get(here)
                if not 0 <= label < self.num_classes or label != int(label):
                    raise UserError(f"{self.files.name(here)} has the label {label:g}; expected a class from 0 to "
                                    f"{self.num_classes - 1}")
                return decode(payload, self.files.name(here)), Photograph(payload, int(label), here, offset > 0)
            except UserError as error:
                self.mark_bad(here, str(error))
        raise UserError(f"{self.files.name(position)}: none of {len(self)} photographs can be used")

    def mark_bad(self, position: int, reason: str) -> None:
        """Never use a photograph again; UserError, unless bad ones are to be skipped."""
        if not self.skip_bad:
            raise UserError(reason if self.skip_bad is None else f"{reason}; leave such ones out with --skip-bad")
        if self.bad.setdefault(position, reason) is reason:
            print(f"warning: {reason}; left out", file=sys.stderr, flush=True)


def open_rgb(payload: bytes, name: str) -> Image.Image:
    """Decode a photograph as RGB; UserError naming it."""
    image = open_image(payload, name)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_whole(payload: bytes, name: str) -> None:
    """Raise UserError for a photograph that is cut short, by its ends if it is a JPEG or PNG, else by decoding it."""
    if not looks_whole(payload):
        open_image(payload, name)


def for_dali(payload: bytes, name: str) -> bytes:
    """Return a photograph that DALI decodes as `open_image` does: itself if it is an upright JPEG or PNG of 8-bit gray
    or RGB without transparency, else such a PNG of its pixels. Raises UserError for one that is cut short or damaged.
    """
    check_whole(payload, name)
    try:
        image = Image.open(io.BytesIO(payload))
        is_upright = b"eXIf" not in payload if image.format == "PNG" else image.getexif().get(EXIF_ORIENTATION, 1) == 1
        is_plain = image.format in ("JPEG", "PNG") and image.mode in ("L", "RGB") and "transparency" not in image.info
    except (OSError, ValueError, SyntaxError):
        is_upright = is_plain = False
    if is_upright and is_plain:
        return payload
    stream = io.BytesIO()
    open_image(payload, name).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def looks_whole(payload: bytes) -> bool:
    """Return whether bytes begin and end as a JPEG or PNG file does."""
    if payload.startswith(b"\xff\xd8\xff"):
        return payload.endswith(b"\xff\xd9")
    return payload.startswith(b"\x89PNG\r\n\x1a\n") and payload.endswith(b"IEND\xaeB`\x82")


def image_size(payload: bytes) -> tuple[int, int]:
    """Return (height, width) of an encoded image, from its head alone; (1, 1) if that cannot be read."""
    try:
        with Image.open(io.BytesIO(payload)) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 1, 1


# ------------------------------------------------------------------------------------------------------------- folders

@dataclass(frozen=True, eq=False)
class PhotographSet:
    """Image files with their classes, in place of an ImageSet for images that do not fit in memory.

    files: paths [N]. labels: int64 [N], -1 unknown. classes: names in label order. name: of the set in messages.
    root: the folder that `names` are relative to.
    """

    files: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    root: str = ""
    channels = 3
    size = (TRAIN_SIDE, TRAIN_SIDE)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def names(self) -> list[str]:
        """Paths relative to `root`, with forward slashes."""
        return [file.removeprefix(f"{self.root}/") for file in self.files.tolist()]

    @property
    def fingerprint(self) -> str:
        """A digest of photographs, names, labels and classes; UserError for a photograph that cannot be read."""
        return fingerprint_arrays([fingerprint_files(self.root, self.names)], self.labels, self.classes)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def has_labels(self) -> bool:
        return bool((self.labels >= 0).any())

    def subset(self, indices: np.ndarray | Sequence[int] | slice) -> PhotographSet:
        """Return the photographs at `indices`, in that order."""
        return PhotographSet(self.files[indices], self.labels[indices], self.classes, self.name, self.root)

    def concatenate(self, other: PhotographSet) -> PhotographSet:
        """Return this set followed by `other`, which has the same classes."""
        return PhotographSet(np.concatenate((self.files, other.files)), np.concatenate((self.labels, other.labels)),
                             self.classes, self.name, self.root)

    def names_by_class(self) -> dict[str, list[str]]:
        """Return class -> file names, for a list of the labelled images."""
        found: dict[str, list[str]] = {name: [] for name in self.classes}
        for file, label in zip(self.files.tolist(), self.labels.tolist(), strict=True):
            found[self.classes[label]].append(Path(file).name)
        return found


def list_photographs(folder: Path, classes: Sequence[str] | None = None) -> PhotographSet:
    """Return the photographs of `<folder>/<class>/`, or those that a list labels; none of them is decoded.

    classes: names in label order that another set fixes. Raises UserError without any, and for a class outside
    `classes`.
    """
    files = find_images(folder)
    files.warn()
    found = labels_of(files)
    if found is None:
        what = "no images in it" if not files.members else "its images lie in no class folders, so their classes are " \
            "unknown: sort them into folders, or list them in labels.csv (file,label)"
        raise UserError(f"{folder}: {what}; expected {folder.name}/<class>/<file>")
    if classes is not None:
        found = FolderClasses(match_labels(found.labels, found.names, classes, folder), tuple(classes))
    kept = np.flatnonzero(found.labels >= 0)
    paths = np.array([f"{folder}/{files.members[index].name}" for index in kept])
    return PhotographSet(paths, found.labels[kept], found.names, folder.name, str(folder))


def list_unlabeled(folder: Path, classes: Sequence[str] = ()) -> PhotographSet:
    """Return all photographs below a folder, at any depth, as of unknown class; UserError if there are none."""
    names = find_images(folder).names
    if not names:
        raise UserError(f"{folder}: no images in it")
    return PhotographSet(np.array([f"{folder}/{name}" for name in names]), np.full(len(names), -1, np.int64),
                         tuple(classes), folder.name, str(folder))


def list_imagenet(data_dir: str | Path, split: str) -> PhotographSet:
    """Return `<data_dir>/imagenet/<train|val>/<class>/`; UserError if it is missing, empty or has other classes."""
    train = Path(data_dir) / "imagenet" / "train"
    folder = train if split == "train" else train.with_name("val")
    if not folder.is_dir():
        raise UserError(f"imagenet: imagenet/{folder.name}/<class>/ not found in {data_dir}; put it there")
    found = list_photographs(folder)
    known = class_folders(train) if split != "train" and train.is_dir() else found.classes
    if other := sorted(set(found.classes) ^ set(known)):
        raise UserError(f"{folder}: the class {other[0]} is in only one of train and val; classes are numbered by the "
                        "order of their folders, so both must have the same")
    return PhotographSet(found.files, found.labels, found.classes, "imagenet", found.root)
