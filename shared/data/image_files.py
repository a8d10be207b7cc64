"""Image files of a folder or ZIP: which there are, how they are labelled, how one is decoded."""
from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from shared.cli import UserError
from shared.data.archives import MAX_RATIO, Member, read_members, zip_members

CLASS_FOLDER_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
MAX_CLASSES = 100_000
MAX_PIXELS = 89_478_485  # Pillow's own bound, at which it only warns
PLAIN_PIXELS = 1 << 24   # below this an image may be of one colour, as well packed as that can be
LABEL_FILE = "dataset.json"
# Labels as read: one integer or None (unknown) an image, or one list of numbers an image.
Labels = list[int | None] | list[list[float]]


@dataclass(frozen=True)
class ImageFiles:
    """The image files under a folder or in a ZIP, in order, with the content of its dataset.json ({} without one)."""

    path: Path
    members: tuple[Member, ...]
    labels: dict[str, object]

    @property
    def names(self) -> list[str]:
        """Paths relative to the root, with forward slashes."""
        return [member.name for member in self.members]

    def read(self) -> Iterator[bytes]:
        """Yield the content of each file."""
        return read_members(self.path, self.members)


@cache
def pillow_suffixes() -> frozenset[str]:
    """Return the file name endings that Pillow decodes by itself (PostScript would start another program)."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind != "EPS")


def find_images(path: Path, suffixes: frozenset[str] | None = None, prefix: str = "") -> ImageFiles:
    """List the images below a folder or in a ZIP, sorted by name as text.

    `suffixes`: file name endings in lower case (default: what Pillow decodes). `prefix`: only the names that begin so.
    Raises UserError if the path is neither, or a ZIP is damaged or hostile.
    """
    suffixes = pillow_suffixes() if suffixes is None else suffixes
    if path.is_dir():
        found = [Member(name) for name in walk(path)]
    elif path.suffix.lower() == ".zip":
        found = zip_members(path)
    else:
        raise UserError(f"{path}: Path must point to a directory or zip")
    labels: dict[str, object] = {}
    for name in dict.fromkeys((LABEL_FILE, prefix + LABEL_FILE)):
        for member in found:
            if member.name == name:
                labels.update(_read_labels(path, member, name.removesuffix(LABEL_FILE)))
    images = [m for m in found if m.name.startswith(prefix) and os.path.splitext(m.name)[1].lower() in suffixes
              and not m.name.rpartition("/")[2].startswith("._")]  # what macOS leaves beside each file
    images.sort(key=lambda member: member.name)
    return ImageFiles(path, tuple(images), labels)


def walk(folder: Path) -> list[str]:
    """Return the relative paths of all files below `folder`, with forward slashes, in no particular order."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"cannot read the folder {folder}")
    return [os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")
            for root, _, names in os.walk(folder, followlinks=True) for name in names]


def _read_labels(path: Path, member: Member, folder: str) -> dict[str, object]:
    """Return name -> label as listed by a dataset.json, whose names are relative to its `folder`."""
    where = f"{path}: {member.name}"
    try:
        content = json.loads(next(read_members(path, [member])))
        pairs = content.get("labels") or []
        return {folder + str(name).replace("\\", "/"): label for name, label in pairs}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f'{where} must hold {{"labels": [["file", class], ...]}} ({error})') from None


def listed_labels(files: ImageFiles) -> Labels | None:
    """Return the label that dataset.json gives to each image, in their order; None if it lists none at all.

    An image that is missing from the list or listed with null has the label None. Raises UserError, naming file and
    label, for a label that is no class number (an integer from 0 on), for lists of unequal length or of anything but
    finite numbers, and for a mixture of the two.
    """
    labels = [files.labels.get(name) for name in files.names]
    if all(label is None for label in labels):
        return None
    where = f"{files.path}: {LABEL_FILE}"
    lengths = {len(label) if isinstance(label, list) else None for label in labels}
    if lengths != {None}:
        if len(lengths) > 1:
            raise UserError(f"{where}: every image must have a list of numbers of the same length, or none of them")
        for name, label in zip(files.names, labels, strict=True):
            if not all(type(v) in (int, float) and np.isfinite(v) for v in label):
                raise UserError(f"{where}: the label of {name} must hold finite numbers, got {label!r}")
        return labels
    for name, label in zip(files.names, labels, strict=True):
        if label is not None and (type(label) is not int or not 0 <= label < MAX_CLASSES):
            raise UserError(f"{where}: the label of {name} must be a class number from 0 to {MAX_CLASSES - 1} or null, "
                            f"got {label!r}")
    return labels


def class_folders(path: Path) -> list[str]:
    """Return the names of the direct sub-folders in class order: by value if all are integers, else as text."""
    names = [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
    if names and all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def class_values(path: Path, folders: Sequence[str], classes: Sequence[str] | None = None) -> dict[str, int]:
    """Return folder name -> class. Folders named by integers are the class of that number, whatever is missing.

    Other names count in sorted order, or by their place in `classes`. Raises UserError for a name outside `classes`
    and for two folders of one class.
    """
    if classes is not None and not set(folders) <= set(classes):
        unknown = sorted(set(folders) - set(classes))[0]
        raise UserError(f"{path}: the class {unknown!r} is not one of the training set's classes")
    if classes is not None:
        return {name: classes.index(name) for name in folders}
    if not (folders and all(name.isascii() and name.isdigit() for name in folders)):
        return {name: index for index, name in enumerate(folders)}
    values = {name: int(name) for name in folders}
    if len(set(values.values())) < len(values):
        raise UserError(f"{path}: two folders mean the same class: {', '.join(folders)}")
    if max(values.values()) >= MAX_CLASSES:
        raise UserError(f"{path}: the folder {max(folders, key=int)} would be class {max(values.values())}; folders "
                        "named by integers are class numbers, so number them from 0")
    return values


def open_image(data: bytes, name: str) -> Image.Image:
    """Decode one image file; raise UserError, naming it, if it is damaged, hostile or not 8 bits a channel.

    The result has mode L, RGB, LA or RGBA: palettes become the colours they mean, bilevel becomes L.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.format == "EPS":
            raise UserError(f"{name}: PostScript is not read")
        pixels = image.width * image.height
        if pixels > MAX_PIXELS or pixels > PLAIN_PIXELS and pixels * len(image.getbands()) > MAX_RATIO * len(data):
            raise UserError(f"{name}: refused, {len(data)} bytes unfold to {image.width}x{image.height} pixels")
        image.load()
        if image.mode in ("L", "RGB", "LA", "RGBA"):
            return image
        if image.mode == "1":
            return image.convert("L")
        if image.mode == "P":
            return image.convert("RGBA").convert("RGB")
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error, Image.DecompressionBombError,
            OverflowError) as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: cut short or not an image ({reason})") from None
    raise UserError(f"{name}: mode {image.mode} is not 8 bits a channel; convert it to 8-bit gray or RGB")


def to_chw(image: Image.Image, channels: int | None = None) -> np.ndarray:
    """Return uint8 [C, H, W] with 1 or 3 channels (default: as many as the image has), transparency dropped."""
    if channels is None:
        channels = 1 if image.mode in ("L", "LA") else 3
    mode = "L" if channels == 1 else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[None] if channels == 1 else array.transpose(2, 0, 1)
