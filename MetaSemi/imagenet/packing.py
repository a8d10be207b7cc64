"""Packing a list of images into a record file: copied or encoded again on all cores, in order, continued if stopped.

The unfinished files are hidden beside the list (`.NAME.rec.part`, `.NAME.idx.part`) with how far they reach; they get
their final names when they are complete.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from MetaSemi.imagenet.encoding import payloads
from MetaSemi.imagenet.records import encode_record, write_synset
from shared.cli import UserError
from shared.data.classes import MAX_CLASSES
from shared.data.listing import read_class_names, read_lines
from shared.parallel import cores, ordered_map
from shared.training.files import hold, write_json
from shared.training.progress import Progress

CHUNK = 16               # images a worker takes at a time
SECONDS_BETWEEN_NOTES = 10.0


class Entry(NamedTuple):
    """A line of a list: its place among the records from 0, id, labels and path relative to the root."""

    place: int
    number: int
    labels: tuple[float, ...]
    path: str


class Block(NamedTuple):
    """Neighbouring records, encoded. Unless bad ones are skipped, the first bad one ends it.

    index: each record's id and where in `data` it begins. bad: entries that could not be packed, and why not.
    """

    data: bytes
    index: list[tuple[int, int]]
    bad: list[tuple[Entry, str]]


def read_list(path: Path) -> list[Entry]:
    """Return the entries of a list file. Malformed lines are reported and left out, as published.

    Raises UserError for a file without entries.
    """
    entries: list[Entry] = []
    for line_number, line in read_lines(path, "a list: id, label and path between tabs"):
        fields = [field.strip() for field in line.split("\t")]
        try:
            if len(fields) < 3:
                raise ValueError("fewer than 3 columns")
            number, labels = int(fields[0]), tuple(float(field) for field in fields[1:-1])
            if not 0 <= number < 1 << 64:
                raise ValueError(f"the id {number} is out of range")
            if not all(map(math.isfinite, labels)):
                raise ValueError(f"the label {'nan' if any(map(math.isnan, labels)) else 'inf'} is no class")
        except ValueError as error:
            print(f"warning: {path}: line {line_number} left out, expected id, label and path between tabs ({error})",
                  file=sys.stderr)
            continue
        entries.append(Entry(len(entries), number, labels, fields[-1]))
    if not entries:
        raise UserError(f"{path}: no line of it has an id, a label and a path between tabs")
    return entries


def pack(path: Path, options: SimpleNamespace) -> None:
    """Write the record and index files of the list `path`. Raises UserError naming the first bad image.

    options: those of im2rec.py.
    """
    entries = read_list(path)
    output = Output(path, key(path, options), [os.path.join(options.root, entry.path) for entry in entries])
    start = output.entries_done
    if start:
        print(f"continuing {path.with_suffix('.rec')} at record {start} of {len(entries)}")
    bar = Progress(path.stem, len(entries), "images", initial=start)
    try:
        with closing(blocks(entries[start:], options)) as made:
            for block in made:
                output.add(block, options.skip_bad)
                bar.advance(len(block.index) + len(block.bad))
    except BaseException:
        output.suspend()
        raise
    finally:
        bar.close()
    output.finish()
    known = read_class_names(options.classes, {os.path.dirname(entry.path) for entry in entries}) if options.classes \
        else ()
    if names := class_names(entries, known):
        write_synset(path, names)
    skipped = f", {output.skipped} bad left out" if output.skipped else ""
    print(f"{path.with_suffix('.rec')}: {output.records} records, {output.size} bytes{skipped}")


def class_names(entries: Sequence[Entry], known: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the classes in label order, by the folders of the entries; () if unknown.

    known: names in label order, which also has classes without an image.
    """
    folders: dict[float, set[str]] = {}
    for entry in entries:
        folders.setdefault(entry.labels[0], set()).add(os.path.dirname(entry.path))
    single = {int(label): next(iter(names)) for label, names in folders.items() if len(names) == 1 and label >= 0
              and label == int(label)}
    is_named = len(single) == len(folders) == len(set(single.values())) and all(single.values())
    if not is_named or max(single) >= MAX_CLASSES:
        return ()
    if all(known[label:label + 1] == (name,) for label, name in single.items()):
        return tuple(known)
    return tuple(single.get(label, str(label)) for label in range(max(single) + 1))


def key(path: Path, options: SimpleNamespace) -> str:
    """Return the values that must agree for a stopped packing to continue."""
    names = ("root", "pass_through", "resize", "center_crop", "quality", "color", "encoding", "pack_label", "verify",
             "skip_bad")
    settings = json.dumps([getattr(options, name) for name in names])
    return hashlib.sha256(settings.encode() + path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- blocks

def blocks(entries: Sequence[Entry], options: SimpleNamespace) -> Iterator[Block]:
    """Yield the entries' records in blocks of CHUNK: images are decoded in processes, or merely read in threads."""
    chunks = [entries[first:first + CHUNK] for first in range(0, len(entries), CHUNK)]
    paths = ([entry.path for entry in chunk] for chunk in chunks)
    images = ordered_map(partial(payloads, options=options), paths, options.num_thread or cores(),
                         threads=options.pass_through and not options.verify)
    with closing(images):
        for chunk, found in zip(chunks, images, strict=True):
            yield join(chunk, found, options)


def join(entries: Sequence[Entry], images: Sequence[bytes | UserError], options: SimpleNamespace) -> Block:
    """Return the block of these entries. images: the content of each, or the reason for none."""
    pieces, index, bad, size = [], [], [], 0
    for entry, image in zip(entries, images, strict=True):
        try:
            if isinstance(image, UserError):
                raise image
            only_first = not (options.pack_label and len(entry.labels) > 1)
            record = encode_record(entry.number, entry.labels, image, only_first)
        except (UserError, ValueError, OverflowError) as error:
            bad.append((entry, str(error) if isinstance(error, UserError) else f"{entry.path}: {error}"))
            if options.skip_bad:
                continue
            break
        index.append((entry.number, size))
        pieces += record
        size += sum(map(len, record))
    return Block(b"".join(pieces), index, bad)


# ------------------------------------------------------------------------------------------------------------- output

class Output:
    """The record file and its index on their way. `entries_done`: entries of the list that need not be done again.

    images: the file of each entry. size: of the record file.
    """

    def __init__(self, path: Path, key: str, images: Sequence[str]) -> None:
        self.final = path.with_suffix(".rec"), path.with_suffix(".idx")
        self.parts = tuple(file.with_name(f".{file.name}.part") for file in self.final)
        self.note, self.key, self.images = path.with_name(f".{path.stem}.part.json"), key, images
        self.seen, self.seen_count = hashlib.sha256(), 0  # the state of the images done
        try:
            self.held = hold(self.parts[0])
        except BlockingIOError:
            raise UserError(f"{self.final[0]} is being written by another process; wait for it") from None
        self.entries_done, self.records, self.size, self.skipped = self._continued()
        self.files = [open(part, "r+b" if self.entries_done else "w+b") for part in self.parts]
        for file, size in zip(self.files, (self.size, self.index_size), strict=True):
            file.truncate(size)
            file.seek(size)
        self.noted = time.monotonic()

    def _continued(self) -> tuple[int, int, int, int]:
        self.index_size = 0
        try:
            state = json.loads(self.note.read_text(encoding="utf-8"))
            sizes = [part.stat().st_size for part in self.parts]
        except (OSError, ValueError):
            return 0, 0, 0, 0
        if state["key"] != self.key or sizes[0] < state["size"] or sizes[1] < state["index_size"]:
            return 0, 0, 0, 0
        if self._state_of_images(state["entries"]) != state.get("images"):
            print(f"images have changed since {self.final[0]} was begun: it is begun anew", flush=True)
            self.seen, self.seen_count = hashlib.sha256(), 0
            return 0, 0, 0, 0
        self.index_size = state["index_size"]
        return state["entries"], state["records"], state["size"], state["skipped"]

    def _state_of_images(self, count: int) -> str:
        """Return a digest of size, time and inode of the first `count` images, no fewer than at the last call."""
        for image in self.images[self.seen_count:count]:
            try:
                state = os.stat(image)
                self.seen.update(f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}\n".encode())
            except OSError:  # left out as a bad one
                self.seen.update(b"absent\n")
        self.seen_count = count
        return self.seen.hexdigest()

    def add(self, block: Block, skip_bad: bool) -> None:
        """Write the next block; UserError for a bad image unless they are skipped."""
        lines = "".join(f"{number}\t{self.size + start}\n" for number, start in block.index)
        self.index_size += self.files[1].write(lines.encode())
        self.size += self.files[0].write(block.data)
        self.records += len(block.index)
        self.entries_done += len(block.index)
        for entry, reason in block.bad:
            message = f"record {entry.place} (id {entry.number}): {reason}"
            if not skip_bad:
                raise UserError(f"{message}; mend it, or leave bad ones out with --skip-bad")
            print(f"warning: {message}; left out", file=sys.stderr)
            self.skipped += 1
            self.entries_done += 1
        if time.monotonic() - self.noted > SECONDS_BETWEEN_NOTES:
            self._write_note()

    def _write_note(self) -> None:
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        write_json(self.note, {
            "key": self.key, "entries": self.entries_done, "records": self.records, "size": self.size,
            "index_size": self.index_size, "skipped": self.skipped,
            "images": self._state_of_images(self.entries_done)})
        self.noted = time.monotonic()

    def suspend(self) -> None:
        """Keep the unfinished files, from which the same command continues."""
        self._write_note()
        for file in (*self.files, self.held):
            file.close()

    def finish(self) -> None:
        """Give the files their names; UserError where they hold nothing."""
        if not self.records:
            self.suspend()
            raise UserError(f"{self.final[0]}: not one of {self.skipped} images can be read; nothing was written")
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for part, final in zip(self.parts, self.final, strict=True):
            os.replace(part, final)
        self.held.close()
        self.note.unlink(missing_ok=True)
