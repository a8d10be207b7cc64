"""Which images a folder or ZIP holds, of which class each is, and draws of equally many images of every class.

A class is a name. `class_numbers` alone decides which number it has, for folders, ZIPs, converters and trainers, and
`match_labels` alone turns the numbers of one artefact into those of another, by name.
"""
from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shared.cli import UserError, nearest
from shared.data.listing import LABEL_FILE, LABEL_TABLES, is_image_file, left_out, read_label_csv, walk
from shared.data.safe import Member, read_members, zip_members
from shared.training.randomness import numpy_rng

MAX_CLASSES = 100_000
# Images as dataset_tool.py numbers them, a thousand to a folder: such folders are no classes.
NUMBERED = re.compile(r"(\d{5,})/img(\d{8,})\.\w+")
# Labels as listed: one integer or None (unknown) an image, or one list of numbers an image.
Labels = list[int | None] | list[list[float]]


# ------------------------------------------------------------------------------------------------------- image files

@dataclass(frozen=True)
class ImageFiles:
    """The image files under a folder or in a ZIP, sorted by name as text, with the labels that a list gives them.

    labels: name -> label as listed by dataset.json or a CSV; {} without one. classes: names that the list gives the
    classes, in label order; () if none. notes: files left out, and listed names without a file. label_file: the
    list, for messages.
    """

    path: Path
    members: tuple[Member, ...]
    labels: dict[str, object]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    label_file: str = LABEL_FILE

    def __len__(self) -> int:
        return len(self.members)

    @property
    def names(self) -> list[str]:
        """Paths relative to the root, with forward slashes."""
        return [member.name for member in self.members]

    def read(self) -> Iterator[bytes]:
        """Yield the content of each file."""
        return read_members(self.path, self.members)

    def warn(self) -> None:
        """Print the warnings about the files."""
        for note in self.notes:
            warnings.warn(f"{self.path}: {note}", stacklevel=2)


def find_images(path: Path, prefix: str = "", table: Path | None = None) -> ImageFiles:
    """List the images below a folder or in a ZIP whose names begin with `prefix`; files without an ending count by
    their content.

    table: a CSV of labels; by default the dataset.json or CSV of `find_table`. Raises UserError if the path is neither
    folder nor ZIP, a ZIP is damaged or hostile, and for a list of labels that contradicts itself.
    """
    if path.is_dir():
        found = [Member(name) for name in walk(path)]
    elif path.suffix.lower() == ".zip":
        found = zip_members(path)
    else:
        raise UserError(f"{path}: Path must point to a directory or zip")
    found = [member for member in found if member.name.startswith(prefix) or member.name == LABEL_FILE]
    images = sorted((member for member in found if member.name.startswith(prefix) and is_image_file(path, member)),
                    key=lambda member: member.name)
    note = left_out(found, images, prefix)
    files = ImageFiles(path, tuple(images), {}, notes=(note,) if note else ())
    lists = [member for name in dict.fromkeys((LABEL_FILE, prefix + LABEL_FILE))
             for member in found if member.name == name]
    if lists and table is None:
        return _with_json(files, lists, prefix)
    if table is not None:
        return _with_table(files, table)
    table = find_table(path)
    if table is None or table.parent == path:
        return files if table is None else _with_table(files, table)
    try:
        return _with_table(files, table)
    except UserError as error:  # it may be about something else
        return replace(files, notes=(*files.notes, f"the CSV beside it is not used ({error})"))


# --------------------------------------------------------------------------------------------------- lists of labels

def find_table(path: Path) -> Path | None:
    """Return the CSV of labels of a folder or ZIP: labels.csv or label_these.csv in a folder or beside it, or
    NAME.csv beside it; None without."""
    inside = [path / name for name in LABEL_TABLES] if path.is_dir() else []
    own = path.absolute()
    beside = [own.with_name(f"{own.stem if path.is_file() else own.name}.csv"),
              *(own.with_name(name) for name in LABEL_TABLES)]
    return next((file for file in (*inside, *beside) if file.is_file()), None)


def _with_table(files: ImageFiles, table: Path) -> ImageFiles:
    """Return the files with the labels of a CSV; names are relative to the folder, to one above it or absolute."""
    found = read_label_csv(table)
    names, above = set(files.names), "/" + files.path.resolve().as_posix().strip("/") + "/"
    labels, absent = {}, []
    numbers = class_numbers({label for label in found.labels if label is not None}, table)
    for listed, label in zip(found.files, found.labels, strict=True):
        name = listed if listed in names else _below(listed, above, names)
        if name is None:
            absent.append(listed)
        else:
            labels[name] = None if label is None else numbers[label]
    if not labels:
        raise _names_nothing(files, table.name, list(found.files))
    notes = files.notes if table.parent != files.path else (*files.notes, *_listed_in_vain(table.name, absent))
    classes = () if are_numbers(numbers) else tuple(numbers)
    return replace(files, labels=labels, classes=classes, notes=notes, label_file=table.name)


def _below(listed: str, above: str, names: Collection[str]) -> str | None:
    """Return the name below the folder `above` that a longer path means, such as train/a.png for a.png in train/."""
    parts = listed.strip("/").split("/")
    for count in range(1, len(parts)):
        name = "/".join(parts[count:])
        if name in names and above.endswith("/" + "/".join(parts[:count]) + "/"):
            return name
    return None


def _with_json(files: ImageFiles, lists: Sequence[Member], prefix: str) -> ImageFiles:
    labels: dict[str, object] = {}
    classes: tuple[str, ...] = ()
    for member in lists:
        listed, named = _read_labels(files.path, member)
        labels.update(listed)
        classes = named or classes
    labels = {name: label for name, label in labels.items() if name.startswith(prefix)}
    absent = sorted(set(labels) - set(files.names))
    if labels and len(absent) == len(labels):
        return replace(files, labels=labels)  # an error where labels are wanted
    return replace(files, labels=labels, classes=classes, notes=(*files.notes, *_listed_in_vain(LABEL_FILE, absent)))


def _listed_in_vain(source: str, absent: Sequence[str]) -> tuple[str, ...]:
    return (f"{source} lists {len(absent)} files that are not there (first: {absent[0]})",) if absent else ()


def _names_nothing(files: ImageFiles, source: str, listed: Sequence[str]) -> UserError:
    found = f"found: {files.names[0]}" if files.members else "found: no images"
    return UserError(f"{files.path}: {source} lists {len(listed)} files, none of which is there (listed: {listed[0]}; "
                     f"{found}); names are relative to that folder")


def _read_labels(path: Path, member: Member) -> tuple[dict[str, object], tuple[str, ...]]:
    """Return (name -> label as listed, class names) of a dataset.json, whose names are relative to its folder."""
    folder = member.name.removesuffix(LABEL_FILE)
    try:
        content = json.loads(next(read_members(path, [member])))
        pairs = [(folder + str(name).replace("\\", "/").removeprefix("./"), label)
                 for name, label in content.get("labels") or []]
        classes = tuple(content.get("classes") or ())
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f'{path}: {member.name} must hold {{"labels": [["file", class], ...]}} ({error})') from None
    if len(set(map(str, classes))) < len(classes) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: {member.name}: `classes` must be a list of different names, in label order")
    labels = dict(pairs)
    if len(labels) < len(pairs):
        for name, label in pairs:
            if labels[name] != label:
                raise UserError(f"{path}: {member.name} lists {name} twice, as {label} and as {labels[name]}; keep the "
                                "right one")
    return labels, classes


# ------------------------------------------------------------------------------------------------------------ classes

class FolderClasses(NamedTuple):
    """Classes by folder. labels: int64 [N], -1 for an image in no class folder. names: in label order."""

    labels: np.ndarray
    names: tuple[str, ...]


def class_numbers(folders: Iterable[str], source: str | Path) -> dict[str, int]:
    """Return folder name -> class number, in class order, for the folders that hold images.

    Where all names are integers, each is the class of that number, whatever is missing; other names count in sorted
    order. Raises UserError for two folders of one class, and for numbers too large to be classes.
    """
    folders = sorted(set(folders))
    if not are_numbers(folders):
        return {name: number for number, name in enumerate(folders)}
    numbers = {name: int(name) for name in sorted(folders, key=int)}
    if len(set(numbers.values())) < len(numbers):
        raise UserError(f"{source}: two folders mean the same class: {', '.join(folders)}")
    if max(numbers.values()) >= MAX_CLASSES:
        raise UserError(f"{source}: the folder {max(folders, key=int)} would be class {max(numbers.values())}; folders "
                        "named by integers are class numbers, so number them from 0")
    return numbers


def _unknown_class(unknown: Sequence[str], classes: Sequence[str], source: str | Path) -> UserError:
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    return UserError(f"{source}: the class {unknown[0]!r}{more} is not one of the training set's classes"
                     f"{nearest(unknown[0], classes)} ({known})")


def match_labels(labels: np.ndarray, own: Sequence[str], classes: Sequence[str], source: str | Path) -> np.ndarray:
    """Return int64 labels [N] of classes named `own` as numbers of the same names in `classes`.

    Where one side knows its classes as numbers alone, there is nothing to match, and the labels stay. Names of `own`
    that no label has do not count. Raises UserError for other names that `classes` lacks.
    """
    if not has_names(own) or not has_names(classes):
        return labels
    numbers = {name: number for number, name in enumerate(classes)}
    occurring = [own[label] for label in np.unique(labels).tolist() if label >= 0]
    if unknown := [name for name in occurring if name not in numbers]:
        raise _unknown_class(unknown, classes, source)
    table = np.array([*(numbers.get(name, -1) for name in own), -1], np.int64)  # the last one for -1
    return table[labels]


def has_names(classes: Sequence[str]) -> bool:
    """Return whether classes have names, other than their numbers."""
    return bool(classes) and not are_numbers(classes)


def are_numbers(folders: Collection[str]) -> bool:
    """Return whether there are folders and all are named by integers, which are their class numbers."""
    return bool(folders) and all(name.isascii() and name.isdigit() for name in folders)


def classes_by_folder(names: Sequence[str], source: str | Path, loose: bool = False) -> FolderClasses | None:
    """Return the classes of images by their top-level folders; None if there are no class folders.

    names: paths relative to the root. loose: images beside the folders are a class of their own, the first, as in the
    published converter; otherwise they have none. Raises UserError.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    folders = set(tops) if loose else set(tops) - {""}
    if not folders - {""} or all(map(_is_numbered, names)):
        return None
    numbers = class_numbers(folders, source)
    by_number = {number: folder for folder, number in numbers.items()}
    found = tuple(by_number.get(c, str(c)) for c in range(max(by_number) + 1))
    return FolderClasses(np.array([numbers.get(top, -1) for top in tops], np.int64), found)


def in_class_order(labels: np.ndarray, names: Sequence[str]) -> list[int]:
    """Return the positions of the images that have a class: class by class, inside it by sub-folder, then by name."""
    return sorted(np.flatnonzero(labels >= 0).tolist(), key=lambda i: (labels[i], *names[i].rpartition("/")[::2]))


def _is_numbered(name: str) -> bool:
    match = NUMBERED.fullmatch(name)
    return match is not None and int(match[1]) == int(match[2]) // 1000


def class_folders(path: Path) -> list[str]:
    """Return the names of the sub-folders that hold images, in class order, without listing every image."""
    names = [entry.name for entry in os.scandir(path) if entry.is_dir()
             and any(is_image_file(path, Member(f"{entry.name}/{name}")) for name in walk(path / entry.name))]
    return list(class_numbers(names, path))


def listed_labels(files: ImageFiles) -> Labels | None:
    """Return the label that dataset.json or a CSV gives to each image, in their order; None if it lists none at all.

    An image that is missing from the list or listed with null has the label None. Raises UserError, naming file and
    label, for a list that names none of the images, for a label that is no class number (an integer from 0 on) or has
    no name among `classes`, for lists of unequal length or of anything but finite numbers, and for a mixture.
    """
    labels = [files.labels.get(name) for name in files.names]
    if files.labels and not any(name in files.labels for name in files.names):
        raise _names_nothing(files, files.label_file, list(files.labels))
    if all(label is None for label in labels):
        return None
    where = f"{files.path}: {files.label_file}"
    lengths = {len(label) if isinstance(label, list) else None for label in labels}
    if len(lengths) > 1:
        raise UserError(f"{where}: every image must have a list of numbers of the same length, or none of them")
    most = len(files.classes) or MAX_CLASSES
    for name, label in zip(files.names, labels, strict=True):
        if isinstance(label, list):
            if not all(type(v) in (int, float) and np.isfinite(v) for v in label):
                raise UserError(f"{where}: the label of {name} must hold finite numbers, got {label!r}")
        elif label is not None and (type(label) is not int or not 0 <= label < most):
            raise UserError(f"{where}: the label of {name} must be a class number from 0 to {most - 1} or null, "
                            f"got {label!r}")
    return labels


def in_order(files: ImageFiles, prefix: str = "") -> tuple[ImageFiles, FolderClasses | None]:
    """Return the images as every reader counts them, and their classes: as listed, or class folder after class folder,
    without those that lie in none. prefix: as in `labels_of`. Raises UserError."""
    found = labels_of(files, prefix)
    if found is None or listed_labels(files) is not None:
        return files, found
    order = in_class_order(found.labels, [name.removeprefix(prefix) for name in files.names])
    kept = replace(files, members=tuple(files.members[position] for position in order))
    return kept, FolderClasses(found.labels[order], found.names)


def labels_of(files: ImageFiles, prefix: str = "") -> FolderClasses | None:
    """Return the classes of images by a list of labels, else by class folders; None without either, or for labels that
    are lists of numbers. prefix: of all names, before the class folder. Raises UserError."""
    labels = listed_labels(files)
    if labels is None:
        return classes_by_folder([name.removeprefix(prefix) for name in files.names], files.path)
    if isinstance(labels[0], list):
        return None
    numbers = np.array([-1 if label is None else label for label in labels], np.int64)
    return FolderClasses(numbers, files.classes or tuple(map(str, range(numbers.max() + 1))))


def class_balanced_draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return int64 positions: `per_class` of every class in `labels` [N], each image as evenly often as possible."""
    chosen = []
    for label in np.unique(labels):
        positions = numpy_rng(seed, int(label), "balanced pseudo-labels").permutation(np.flatnonzero(labels == label))
        chosen.append(np.resize(positions, per_class))
    return np.concatenate(chosen)
