"""List the images below a folder, then pack them into RecordIO files, byte for byte as MXNet's im2rec does.

    python im2rec.py ./val /your-download-path/val --recursive --list --num-thread 8
    python im2rec.py ./val /your-download-path/val --recursive --pass-through --pack-label --num-thread 8

The first writes val.lst (id, label, path), the second val.rec and val.idx. A stopped command continues when it is
given again.
"""
from __future__ import annotations

import argparse
import os
import random
import re
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path

from shared.cli import Parser, UserError, run_main
from shared.training.files import atomic
from shared.training.progress import progress

SHUFFLE_SEED = 100


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("prefix", help="of the .lst, .rec and .idx files")
    parser.add_argument("root", help="folder that holds the images")
    lists = parser.add_argument_group("making a list")
    lists.add_argument("--list", action="store_true", help="write .lst files and stop")
    lists.add_argument("--exts", nargs="+", default=[".jpeg", ".jpg", ".png"], help="endings of image files")
    lists.add_argument("--chunks", type=int, default=1, help="cut the list into so many")
    lists.add_argument("--train-ratio", type=float, default=1.0, help="share of each list for _train.lst")
    lists.add_argument("--test-ratio", type=float, default=0.0, help="share for _test.lst; the rest is _val.lst")
    lists.add_argument("--recursive", action="store_true", help="go into sub-folders; each is a class")
    lists.add_argument("--no-shuffle", dest="shuffle", action="store_false", help="keep the order of the folders")
    lists.add_argument("--classes", metavar="FILE", help="names of the class folders in label order, one a line "
                       "(default: the folders found, in sorted order)")
    records = parser.add_argument_group("packing records")
    records.add_argument("--pass-through", action="store_true", help="store the files' bytes unchanged")
    records.add_argument("--resize", type=int, default=0, help="length of the shorter edge; 0: keep the size")
    records.add_argument("--center-crop", action="store_true", help="cut out the central square first")
    records.add_argument("--quality", type=int, default=95, help="JPEG quality 1-100, or PNG compression 1-9")
    records.add_argument("--num-thread", type=int, default=None, help="workers (default: one a core)")
    records.add_argument("--color", type=int, choices=(-1, 0, 1), default=1, help="1 colour, 0 gray, -1 as it is")
    records.add_argument("--encoding", choices=(".jpg", ".png"), default=".jpg")
    records.add_argument("--pack-label", action="store_true", help="store all labels of a list with several")
    records.add_argument("--verify", action="store_true", help="with --pass-through: decode every image, to be sure")
    records.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read, and count it")
    options = parser.parse_args(argv)
    options.prefix, options.root = os.path.abspath(options.prefix), os.path.abspath(options.root)
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    if not os.path.isdir(options.root):
        raise UserError(f"root: there is no folder {options.root}")
    if options.chunks < 1:
        raise UserError(f"--chunks {options.chunks}: expected at least 1")
    if options.num_thread is not None and options.num_thread < 1:
        raise UserError(f"--num-thread {options.num_thread}: expected at least 1")
    if options.resize < 0:
        raise UserError(f"--resize {options.resize}: expected a length in pixels, or 0 to keep the size")
    if not 1 <= options.quality <= 100:
        raise UserError(f"--quality {options.quality}: expected 1 to 100 (PNG: 1 to 9)")
    if not (0 <= options.train_ratio <= 1 and 0 <= options.test_ratio <= 1):
        raise UserError(f"--train-ratio {options.train_ratio} --test-ratio {options.test_ratio}: expected shares of "
                        "at most 1 together")
    if options.train_ratio < 1 and options.train_ratio + options.test_ratio > 1:
        raise UserError(f"--train-ratio {options.train_ratio} and --test-ratio {options.test_ratio} are more than 1 "
                        "together")


def main() -> None:
    options = parse()
    if options.list:
        write_lists(options)
        return
    from MetaSemi.imagenet.packing import pack  # loads NumPy: only once the command line is known to be right

    for path in find_lists(options.prefix):
        pack(path, options)


# ------------------------------------------------------------------------------------------------------------- lists

def write_lists(options: argparse.Namespace) -> None:
    """Write the .lst files and print the label of every folder; UserError where there is no image."""
    exts = set(options.exts)
    found = list(progress(walk(options.root, exts) if options.recursive else flat(options.root, exts), "listing",
                          unit="images"))
    if not found:
        deeper = "" if options.recursive else "; give --recursive to look into its sub-folders"
        raise UserError(f"{options.root}: no file ends with {' or '.join(options.exts)}{deeper}")
    folders = dict.fromkeys(os.path.dirname(path) for path in found) if options.recursive else {"": 0}
    labels = numbered(folders, options.classes)
    if options.recursive:
        for folder, label in labels.items():
            print(folder or ".", label)
    lines = [f"{number}\t{labels[os.path.dirname(path)]:f}\t{path}\n" for number, path in enumerate(found)]
    if options.shuffle:
        random.Random(SHUFFLE_SEED).shuffle(lines)
    for suffix, part in parts(lines, options.chunks, options.train_ratio, options.test_ratio):
        with atomic(f"{options.prefix}{suffix}.lst", "w") as file:
            file.writelines(part)


def walk(root: str, exts: set[str], folder: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield paths of images relative to `root`: a folder's files by name, then its sub-folders; links are followed."""
    try:
        place = os.stat(os.path.join(root, folder))
        entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{os.path.join(root, folder)}: cannot be read ({error.strerror})") from None
    here = (place.st_dev, place.st_ino)
    if here in above:  # a link that leads back up
        return
    for entry in entries:
        if os.path.splitext(entry.name)[1].lower() in exts and entry.is_file():
            yield os.path.join(folder, entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from walk(root, exts, os.path.join(folder, entry.name), (*above, here))


def flat(root: str, exts: set[str]) -> list[str]:
    """Return the names of the images directly in `root`, sorted."""
    return sorted(entry.name for entry in os.scandir(root)
                  if os.path.splitext(entry.name)[1].lower() in exts and entry.is_file())


def numbered(folders: dict[str, int], classes: str | None) -> dict[str, int]:
    """Return folder -> label: in the order given, or as listed in the file `classes`; UserError."""
    if classes is None:
        return {folder: label for label, folder in enumerate(folders)}
    try:
        names = Path(classes).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes: cannot read {classes} ({error})") from None
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise UserError(f"--classes: the folder {unknown[0] or '.'!r} is not listed in {classes}")
    return {folder: names.index(folder) for folder in folders}


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

    Where there are none and the prefix is a folder: all lists in it. UserError where there are none at all.
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
