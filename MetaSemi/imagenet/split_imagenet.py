"""Split the ImageNet training images into labelled and unlabelled ones, class by class.

    cd imagenet
    python split_imagenet.py --data-path "/your-download-path"

It links DATA/train/<wnid>/<file> into DATA/labeled or DATA/unlabeled (`--copy`: copies it). Which image goes where is
read from imagenet_split/train_labeled.txt and train_unlabeled.txt; where these do not exist they are made, the same on
every machine. The same command continues where an earlier one was stopped.
"""
from __future__ import annotations

import filecmp
import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shared.cli import Flag, Float, Int, Option, UserError, parse, run_main
from shared.data.classes import class_folders
from shared.data.listing import is_hidden, is_image, read_lines, walk
from shared.training.files import atomic, make_dir, write_text
from shared.training.progress import progress

SUFFIXES = (".jpeg", ".jpg", ".png")
LISTS = {"labeled": "train_labeled.txt", "unlabeled": "train_unlabeled.txt"}
FLAGS = (
    Option("--data-path", required=True, metavar="DIR", help="folder that holds train/<wnid>/<file>"),
    Option("--list-path", default="./imagenet_split", metavar="DIR", help="folder of the two lists, read where they "
           "exist and made where not"),
    Option("--per-class", Int(1), 128, "labelled images of each class"),
    Option("--fraction", Float(0, 1, open=True), None, "label this fraction of each class instead"),
    Option("--seed", Int(), 0, "another seed labels other images"),
    Option("--copy", Flag, False, "copy the images (another 140 GB) instead of linking them"),
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    data = Path(options.data_path)
    train = data / "train"
    if not train.is_dir():
        raise UserError(f"--data-path {data}: there is no folder train/ in it; expected train/<wnid>/<file>.JPEG")
    lists, drawn = read_lists(Path(options.list_path), train), False
    if lists is None:
        chosen = split(images_by_class(train), options.seed, options.per_class, options.fraction)
        lists, drawn = dict(zip(LISTS, chosen, strict=True)), True
    check(lists, data)
    if drawn:
        write_lists(Path(options.list_path), lists)
    for part, names in lists.items():
        fill(data / part, names, train, options.copy)
        print(f"{data / part}: {len(names)} images of {len({name.split('/')[0] for name in names})} classes, "
              f"{'copied' if options.copy else 'linked'}")


def images_by_class(train: Path) -> dict[str, list[str]]:
    """Return wnid -> file names of the images in train/; what is no image by its name is left out, and counted."""
    found, left_out = {}, []
    for folder in sorted(entry.name for entry in os.scandir(train) if entry.is_dir()):
        entries = [entry.name for entry in os.scandir(train / folder)]
        names = [name for name in entries if name.lower().endswith(SUFFIXES) and not is_hidden(f"{folder}/{name}")]
        left_out += [f"{folder}/{name}" for name in set(entries) - set(names)]
        if names:
            found[folder] = names
    if left_out:
        print(f"left out {len(left_out)} files of {train} that are hidden or no {' '.join(SUFFIXES)} (first: "
              f"{min(left_out)})")
    if not found:
        raise UserError(f"{train}: no images; expected train/<wnid>/<file>.JPEG")
    return found


def split(files: Mapping[str, Iterable[str]], seed: int = 0, per_class: int = 128,
          fraction: float | None = None) -> tuple[list[str], list[str]]:
    """Return the labelled and the unlabelled images as sorted `<wnid>/<file name>`.

    files: wnid -> file names. Within a class the images are ordered by a hash of seed, wnid and name; the first
    `per_class` (or a fraction, rounded, at least one) are labelled. The choice depends on neither the machine nor the
    order of the folder. Raises UserError for a class that would have no unlabelled image: it would be missing from
    that tree, and all later classes would get other numbers than in the labelled one.
    """
    labeled, unlabeled = [], []
    for wnid in sorted(files):
        names = sorted(files[wnid], key=lambda name: hashlib.sha256(f"{seed}/{wnid}/{name}".encode()).hexdigest())
        count = per_class if fraction is None else max(1, math.floor(fraction * len(names) + 0.5))
        if count >= len(names):
            flag = f"--per-class {per_class}" if fraction is None else f"--fraction {fraction}"
            raise UserError(f"{flag}: the class {wnid} has {len(names)} image(s), so none would remain unlabelled; "
                            "label fewer")
        labeled += sorted(f"{wnid}/{name}" for name in names[:count])
        unlabeled += sorted(f"{wnid}/{name}" for name in names[count:])
    return labeled, unlabeled


def read_lists(folder: Path, train: Path) -> dict[str, list[str]] | None:
    """Return part -> names in the list files, None without such files; UserError.

    A line is the name of a file, which may hold blanks, or such a name and further columns.
    """
    there = [name for name in LISTS.values() if (folder / name).exists()]
    if not there:
        return None
    if len(there) == 1:
        raise UserError(f"{folder} holds {there[0]} alone; put the other list beside it, or remove this one and both "
                        "are made anew")
    lists = {}
    for part, name in LISTS.items():
        lists[part] = []
        for number, line in read_lines(folder / name):
            words = line.split()
            image = line if len(words) == 1 or (train / line).is_file() else words[0]
            pieces = image.split("/")
            if len(pieces) != 2 or any(piece in ("", ".", "..") for piece in pieces):
                raise UserError(f"{folder / name}: line {number} must begin with <wnid>/<file name>, it is {line!r}")
            lists[part].append(image)
    return lists


def check(lists: Mapping[str, Sequence[str]], data: Path) -> None:
    """Raise UserError for lists that share images or classes wrongly, and for folders filled from other lists."""
    both = set(lists["labeled"]) & set(lists["unlabeled"])
    if both:
        raise UserError(f"{sorted(both)[0]} is in both lists; an image is either labelled or unlabelled")
    classes = {part: {name.split("/")[0] for name in names} for part, names in lists.items()}
    val = data / "val"
    if val.is_dir():
        classes["val"] = set(class_folders(val))
        if not classes["val"] and any(is_image(name) for name in walk(val)):
            raise UserError(f"{val}: its images lie in no class folders, so their classes are unknown; sort them into "
                            "val/<wnid>/<file>, or take val/ out of --data-path")
    for part in classes:
        other = sorted(classes["labeled"] ^ classes[part])
        if other:
            raise UserError(f"the class {other[0]} is in only one of labeled and {part}; classes are numbered by their "
                            "order in each, so all must have the same")
    for part, names in lists.items():
        expected = set(names)
        for folder in os.scandir(data / part) if (data / part).is_dir() else ():
            for entry in os.scandir(folder.path) if folder.is_dir() else ():
                if f"{folder.name}/{entry.name}" not in expected:
                    raise UserError(f"{entry.path} is not in {LISTS[part]}: the folder was made from another list; "
                                    f"remove {data / part} or give that list")


def write_lists(folder: Path, lists: Mapping[str, Sequence[str]]) -> None:
    make_dir(folder)
    for part, name in LISTS.items():
        write_text(folder / name, "".join(f"{line}\n" for line in lists[part]))


def fill(target: Path, names: Sequence[str], train: Path, copy: bool) -> None:
    """Link or copy train/<name> to target/<name>; existing files stay. UserError for a missing image."""
    for folder in sorted({name.split("/")[0] for name in names}):
        make_dir(target / folder)
    for number, name in enumerate(progress(names, target.name, unit="images"), 1):
        source, place = train / name, target / name
        if not source.is_file():
            raise UserError(f"{LISTS[target.name]}: line {number} names {name}, which is not in {train}")
        if copy:
            if place.is_symlink() or not place.exists() or not filecmp.cmp(source, place, shallow=False):
                with open(source, "rb") as image, atomic(place) as file:
                    shutil.copyfileobj(image, file)
        elif not place.exists():
            place.unlink(missing_ok=True)  # a link to nowhere
            os.symlink(os.path.relpath(source, place.parent), place)


if __name__ == "__main__":
    run_main(main)
