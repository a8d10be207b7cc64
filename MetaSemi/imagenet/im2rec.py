"""List the images below a folder, then pack them into RecordIO files, byte for byte as MXNet's im2rec does.

    python im2rec.py ./val /your-download-path/val --recursive --list --num-thread 8
    python im2rec.py ./val /your-download-path/val --recursive --pass-through --pack-label --num-thread 8

The first writes val.lst (id, label, path), the second val.rec, val.idx and the names of the classes, val.synset.txt, if
each class has a folder of its own. A stopped command continues when it is given again. A root without images ends
--list with an error, where MXNet's program writes an empty list.
"""
from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from types import SimpleNamespace

from MetaSemi.imagenet.packing import pack
from shared.cli import Choice, Flag, Float, Int, Option, UserError, parse, run_main
from shared.data.classes import class_numbers
from shared.data.listing import is_hidden, read_class_names, walk
from shared.training.files import write_text
from shared.training.progress import progress

SHUFFLE_SEED = 100
FLAGS = {
    "files": (
        Option("prefix", required=True, help="path of the .lst, .rec and .idx files, without ending"),
        Option("root", required=True, help="folder that holds the images"),
    ),
    "making a list": (
        Option("--list", Flag, False, "write .lst files and stop"),
        Option("--exts", default=(".jpeg", ".jpg", ".png"), many=True, metavar="EXT", help="endings of image files"),
        Option("--chunks", Int(1), 1, "number of parts of the list"),
        Option("--train-ratio", Float(0, 1), 1.0, "fraction of each list for _train.lst"),
        Option("--test-ratio", Float(0, 1), 0.0, "fraction for _test.lst; the rest is _val.lst"),
        Option("--recursive", Flag, False, "go into sub-folders; each is a class"),
        Option("--no-shuffle", Flag, False, "keep the order of the folders"),
        Option("--classes", metavar="FILE", help="names of the class folders in label order, one a line",
               default_help="the folders found, in sorted order"),
    ),
    "packing records": (
        Option("--pass-through", Flag, False, "store the files' bytes unchanged"),
        Option("--resize", Int(0), 0, "length of the shorter edge; 0: keep the size", unit="pixels"),
        Option("--center-crop", Flag, False, "cut out the central square first"),
        Option("--quality", Int(1, 100), 95, "JPEG quality 1-100, or PNG compression 1-9"),
        Option("--num-thread", Int(1), None, "workers", default_help="one a core"),
        Option("--color", Int(-1, 1), 1, "1 colour, 0 gray, -1 as it is"),
        Option("--encoding", Choice(".jpg", ".png"), ".jpg", "format of the stored images"),
        Option("--pack-label", Flag, False, "store all labels of a list with several"),
        Option("--verify", Flag, False, "with --pass-through: decode every image, as a check"),
        Option("--skip-bad", Flag, False, "leave out unreadable images, and count them"),
    ),
}


def read_options(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    options = parse(__doc__, FLAGS, argv)
    options.prefix, options.root = os.path.abspath(options.prefix), os.path.abspath(options.root)
    if not os.path.isdir(options.root):
        raise UserError(f"root: there is no folder {options.root}")
    if options.train_ratio < 1 and options.train_ratio + options.test_ratio > 1:
        raise UserError(f"--train-ratio {options.train_ratio} and --test-ratio {options.test_ratio} are more than 1 "
                        "together")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    if options.list:
        return write_lists(options)
    for path in find_lists(options.prefix):
        pack(path, options)


# ------------------------------------------------------------------------------------------------------------- lists

def write_lists(options: SimpleNamespace) -> None:
    """Write the .lst files and print the label of every folder; UserError without images."""
    every = sorted((name for name in progress(walk(Path(options.root)), "listing", unit="files")
                    if options.recursive or "/" not in name), key=published_order)
    found = [name for name in every if os.path.splitext(name)[1].lower() in options.exts and not is_hidden(name)]
    if not found:
        deeper = "" if options.recursive else "; give --recursive to look into its sub-folders"
        raise UserError(f"{options.root}: no file ends with {' or '.join(options.exts)}{deeper}")
    folders = dict.fromkeys(os.path.dirname(path) for path in found) if options.recursive else {"": 0}
    if others := sorted(set(every) - set(found)):
        print(f"left out {len(others)} files that are hidden or end with none of {' '.join(options.exts)} (first: "
              f"{others[0]}); name further endings with --exts")
    check_folders(folders, options, len(found))
    labels = numbered(folders, options)
    if options.recursive:
        for folder, label in labels.items():
            print(folder or ".", label)
    lines = [f"{number}\t{labels[os.path.dirname(path)]:f}\t{path}\n" for number, path in enumerate(found)]
    if not options.no_shuffle:
        random.Random(SHUFFLE_SEED).shuffle(lines)
    for suffix, part in parts(lines, options.chunks, options.train_ratio, options.test_ratio):
        write_text(f"{options.prefix}{suffix}.lst", "".join(part))


def check_folders(folders: dict[str, int], options: SimpleNamespace, count: int) -> None:
    """Raise UserError where no image has a class though --recursive asks for some; warn where all get the same."""
    if options.recursive and not any(folders):
        raise UserError(f"{options.root}: all {count} images lie directly in it, in no class folder; sort them into "
                        f"<class>/<file>, or write {options.prefix}.lst yourself: id, class number and file between "
                        "tabs, one line an image")
    if options.recursive and "" in folders:
        print(f"warning: {options.root}: the images directly in it count as a class of their own", file=sys.stderr)
    if not options.recursive:
        print("warning: every image has the label 0; with --recursive each sub-folder is a class", file=sys.stderr)


def published_order(name: str) -> list[tuple[bool, str]]:
    """Return the sort key of a path: a folder's files by name, then its sub-folders."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def numbered(folders: dict[str, int], options: SimpleNamespace) -> dict[str, int]:
    """Return folder -> label: by class_numbers, or as listed in the file --classes; UserError.

    Folders in folders keep the order in which they were found, as published.
    """
    if options.classes is None:
        if any("/" in folder for folder in folders):
            return {folder: label for label, folder in enumerate(folders)}
        return class_numbers(folders, options.root)
    names = {name: label for label, name in enumerate(read_class_names(options.classes, folders))}
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise UserError(f"--classes: the folder {unknown[0] or '.'!r} is not listed in {options.classes}")
    return {folder: names[folder] for folder in folders}


def parts(lines: Sequence[str], chunks: int, train: float, test: float) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield (suffix, lines) of every list file."""
    size = ceil(len(lines) / chunks)
    first, second = int(size * test), int(size * test) + int(size * train)
    for number in range(chunks):
        chunk = lines[number * size:(number + 1) * size]
        suffix = f"_{number}" if chunks > 1 else ""
        if train == 1.0:
            yield suffix, chunk
            continue
        if test:
            yield f"{suffix}_test", chunk[:first]
        if train + test < 1.0:
            yield f"{suffix}_val", chunk[second:]
        yield f"{suffix}_train", chunk[first:second]


def find_lists(prefix: str) -> list[Path]:
    """Return the lists that --list writes for this prefix: PREFIX.lst and its chunks and parts.

    Without one, if the prefix is a folder: all lists in it. UserError if there is no list.
    """
    own = re.compile(re.escape(os.path.basename(prefix)) + r"(_\d+)?(_train|_val|_test)?\.lst")
    parent = Path(prefix).parent
    found = sorted(path for path in parent.glob("*.lst") if own.fullmatch(path.name)) if parent.is_dir() else []
    if not found and os.path.isdir(prefix):
        found = sorted(Path(prefix).glob("*.lst"))
    if not found:
        raise UserError(f"Did not find and list file with prefix {prefix}; make one with --list")
    return found


if __name__ == "__main__":
    run_main(main)
