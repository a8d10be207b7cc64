"""Tiny-ImageNet as it is unpacked: which images there are, in which order, of which class; decoded once and mapped."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.cli import UserError
from shared.data.cache import Allocate, Stored, cached, fingerprint
from shared.data.image_files import ImageFiles, find_images
from shared.data.images import ImageSet, decode

FOLDER = "tiny-imagenet-200"
CLASSES = 200
SUFFIX = ".JPEG"


def tiny_root(data_dir: str | Path) -> Path:
    """Return the folder tiny-imagenet-200 in `data_dir`, which may already be it; UserError where it is not."""
    root = Path(data_dir)
    root = root if root.name == FOLDER else root / FOLDER
    if not root.is_dir():
        raise UserError(f"tiny: {root} not found; unpack tiny-imagenet-200.zip there")
    return root


def class_names(root: Path) -> list[str]:
    """Return the 200 class folders (WordNet ids) in label order; UserError if there are not 200."""
    folder = root / "train"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if len(names) != CLASSES:
        raise UserError(f"{folder}: expected {CLASSES} class folders, found {len(names)}")
    return names


def scan(data_dir: str | Path, split: str) -> tuple[ImageFiles, np.ndarray, list[str]]:
    """Return (files, int64 labels, class names) of the split "train" or "test" (the folder val), decoding nothing.

    Training images come class by class, inside a class in the order of their paths as text; validation images in the
    order of their names as text, labelled by val_annotations.txt.
    """
    root = tiny_root(data_dir)
    names = class_names(root)
    place = {name: label for label, name in enumerate(names)}
    if split == "train":
        files = find_images(root / "train", frozenset((SUFFIX.lower(),)))
        members = [m for m in files.members if m.name.partition("/")[0] in place and m.name.endswith(SUFFIX)]
        # Folder by folder, as text; the files of a folder before those of its sub-folders.
        members.sort(key=lambda m: (place[m.name.partition("/")[0]], *m.name.rpartition("/")[::2]))
        labels = [place[member.name.partition("/")[0]] for member in members]
        return ImageFiles(files.path, tuple(members), {}), np.array(labels, np.int64), names
    listed = _annotations(root / "val" / "val_annotations.txt", place)
    files = find_images(root / "val" / "images", frozenset((SUFFIX.lower(),)))
    members = [m for m in files.members if "/" not in m.name and m.name.endswith(SUFFIX)]
    if missing := [member.name for member in members if member.name not in listed]:
        raise UserError(f"{root / 'val'}: {missing[0]} is not listed in val_annotations.txt")
    labels = [listed[member.name] for member in members]
    return ImageFiles(files.path, tuple(members), {}), np.array(labels, np.int64), names


def _annotations(path: Path, place: dict[str, int]) -> dict[str, int]:
    """Return file name -> label of a tab-separated list of file, WordNet id and a box."""
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    labels = {}
    for number, row in enumerate(rows, start=1):
        if len(row) < 2 or row[1].strip() not in place:
            raise UserError(f"{path}: line {number}: expected a file and one of the training set's class folders, "
                            f"separated by a tab, got {' '.join(row)[:80]!r}")
        labels[row[0]] = place[row[1].strip()]
    return labels


def load_tiny_imagenet(data_dir: str | Path, split: str) -> ImageSet:
    """Return "train" (100,000) or "test" (the 10,000 of val), 64x64 RGB, memory-mapped from the cache; UserError."""
    root = tiny_root(data_dir)
    parts = (root / "train",) if split == "train" else (root / "val" / "images", root / "val" / "val_annotations.txt")

    def build(allocate: Allocate) -> Stored:
        files, labels, names = scan(root, split)
        return Stored(decode(files, 3, allocate), labels, tuple(names))

    stored = cached("tiny", ["tiny", split, fingerprint(*parts)], build)
    return ImageSet(stored.images, stored.labels, stored.classes, f"tiny {split}")
