"""Which images a folder or ZIP holds, of which class each is, and draws of equally many images of every class.

A class is a name. `class_numbers` alone decides which number it has, for folders, ZIPs, converters and trainers.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from shared.cli import UserError
from shared.data.safe import Member, read_members, zip_members
from shared.training.randomness import numpy_rng

LABEL_FILE = "dataset.json"
# PostScript would start another program; the others need decoders that Pillow does not have.
NOT_DECODED = frozenset(("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"))
SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir"))  # resource forks of macOS, thumbnails of Synology
MAX_CLASSES = 100_000
# Images as dataset_tool.py numbers them, a thousand to a folder: such folders are no classes.
NUMBERED = re.compile(r"(\d{5,})/img(\d{8,})\.\w+")
# Labels as listed: one integer or None (unknown) an image, or one list of numbers an image.
Labels = list[int | None] | list[list[float]]


# ------------------------------------------------------------------------------------------------------- image files

@dataclass(frozen=True)
class ImageFiles:
    """The image files under a folder or in a ZIP, sorted by name as text, with the labels of its dataset.json.

    labels: name -> label as listed; {} without a dataset.json.
    """

    path: Path
    members: tuple[Member, ...]
    labels: dict[str, object]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def names(self) -> list[str]:
        """Paths relative to the root, with forward slashes."""
        return [member.name for member in self.members]

    def read(self) -> Iterator[bytes]:
        """Yield the content of each file."""
        return read_members(self.path, self.members)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file name endings, in lower case, that Pillow decodes by itself."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN
                     and kind not in NOT_DECODED)


def is_image(name: str) -> bool:
    """Return whether a relative path names an image: by its ending, and neither hidden nor in a system folder."""
    parts = name.split("/")
    return os.path.splitext(name)[1].lower() in image_suffixes() and not any(
        part.startswith(".") or part in SYSTEM_FOLDERS for part in parts)


def find_images(path: Path, prefix: str = "") -> ImageFiles:
    """List the images below a folder or in a ZIP whose names begin with `prefix`.

    Raises UserError if the path is neither, or a ZIP is damaged or hostile.
    """
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
    images = [member for member in found if member.name.startswith(prefix) and is_image(member.name)]
    return ImageFiles(path, tuple(sorted(images, key=lambda member: member.name)), labels)


def walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files below `folder`, with forward slashes, in no particular order."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"cannot read the folder {folder}")
    for root, _, names in os.walk(folder, followlinks=True):
        inside = os.path.relpath(root, folder).replace(os.sep, "/") + "/"
        for name in names:
            yield name if inside == "./" else inside + name


def _read_labels(path: Path, member: Member, folder: str) -> dict[str, object]:
    """Return name -> label as listed by a dataset.json, whose names are relative to its `folder`."""
    try:
        content = json.loads(next(read_members(path, [member])))
        pairs = content.get("labels") or []
        return {folder + str(name).replace("\\", "/"): label for name, label in pairs}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f'{path}: {member.name} must hold {{"labels": [["file", class], ...]}} ({error})') from None


# ------------------------------------------------------------------------------------------------------------ classes

class FolderClasses(NamedTuple):
    """Classes by folder. labels: int64 [N], -1 for an image in no class folder. names: in label order."""

    labels: np.ndarray
    names: tuple[str, ...]


def class_numbers(folders: Iterable[str], source: str | Path, classes: Sequence[str] | None = None) -> dict[str, int]:
    """Return folder name -> class number, in class order, for the folders that hold images.

    Where all names are integers, each is the class of that number, whatever is missing; other names count in sorted
    order. `classes`: names in label order that another set fixes. Raises UserError for a name outside `classes`, two
    folders of one class, and numbers too large to be classes.
    """
    folders = sorted(set(folders))
    if classes is not None:
        if unknown := [name for name in folders if name not in classes]:
            raise UserError(f"{source}: the class {unknown[0]!r} is not one of the training set's classes")
        return {name: classes.index(name) for name in sorted(folders, key=classes.index)}
    if not are_numbers(folders):
        return {name: number for number, name in enumerate(folders)}
    numbers = {name: int(name) for name in sorted(folders, key=int)}
    if len(set(numbers.values())) < len(numbers):
        raise UserError(f"{source}: two folders mean the same class: {', '.join(folders)}")
    if max(numbers.values()) >= MAX_CLASSES:
        raise UserError(f"{source}: the folder {max(folders, key=int)} would be class {max(numbers.values())}; folders "
                        "named by integers are class numbers, so number them from 0")
    return numbers


def are_numbers(folders: Collection[str]) -> bool:
    """Return whether there are folders and all are named by integers, which are their class numbers."""
    return bool(folders) and all(name.isascii() and name.isdigit() for name in folders)


def classes_by_folder(names: Sequence[str], source: str | Path, classes: Sequence[str] | None = None,
                      loose: bool = False) -> FolderClasses | None:
    """Return the classes of images by their top-level folders; None if there are no class folders.

    names: paths relative to the root. classes: as in `class_numbers`. loose: images beside the folders are a class of
    their own, the first, as in the published converter; otherwise they have none. Raises UserError.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    folders = set(tops) if loose else set(tops) - {""}
    if not folders - {""} or all(map(_is_numbered, names)):
        return None
    numbers = class_numbers(folders, source, classes)
    by_number = {number: folder for folder, number in numbers.items()}
    found = tuple(classes or (by_number.get(c, str(c)) for c in range(max(by_number) + 1)))
    return FolderClasses(np.array([numbers.get(top, -1) for top in tops], np.int64), found)


def _is_numbered(name: str) -> bool:
    match = NUMBERED.fullmatch(name)
    return match is not None and int(match[1]) == int(match[2]) // 1000


def class_folders(path: Path) -> list[str]:
    """Return the names of the sub-folders that hold images, in class order, without listing every image."""
    names = [entry.name for entry in os.scandir(path) if entry.is_dir()
             and any(is_image(f"{entry.name}/{name}") for name in walk(path / entry.name))]
    return list(class_numbers(names, path))


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
    if len(lengths) > 1:
        raise UserError(f"{where}: every image must have a list of numbers of the same length, or none of them")
    for name, label in zip(files.names, labels, strict=True):
        if isinstance(label, list):
            if not all(type(v) in (int, float) and np.isfinite(v) for v in label):
                raise UserError(f"{where}: the label of {name} must hold finite numbers, got {label!r}")
        elif label is not None and (type(label) is not int or not 0 <= label < MAX_CLASSES):
            raise UserError(f"{where}: the label of {name} must be a class number from 0 to {MAX_CLASSES - 1} or null, "
                            f"got {label!r}")
    return labels


def class_balanced_draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return int64 positions: `per_class` of every class in `labels` [N], each image as evenly often as possible."""
    chosen = []
    for label in np.unique(labels):
        positions = numpy_rng(seed, int(label), "balanced pseudo-labels").permutation(np.flatnonzero(labels == label))
        chosen.append(np.resize(positions, per_class))
    return np.concatenate(chosen)
