"""Packing a list of images into a record file: read or re-encoded on all cores, written in order, continued if stopped.

The unfinished files are hidden beside the list (`.NAME.rec.part`, `.NAME.idx.part`) with how far they reach; they get
their final names when they are complete.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from shared.cli import UserError
from shared.files import atomic
from shared.image_files import open_image
from shared.parallel import cores, ordered_map
from shared.progress import Progress
from shared.records import encode_record

CHUNK = 16               # images a worker takes at a time
SECONDS_BETWEEN_NOTES = 10.0
EXIF_ORIENTATION = 0x0112


class Entry(NamedTuple):
    """A line of a list: its place among the records from 0, id, labels and path relative to the root."""

    place: int
    number: int
    labels: tuple[float, ...]
    path: str


class Bad(NamedTuple):
    """Why an image cannot be packed."""

    reason: str


def read_list(path: Path) -> list[Entry]:
    """Return the entries of a list file. A line that is none is reported and left out, as published.

    Raises UserError for a file that holds none at all.
    """
    entries: list[Entry] = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = [field.strip() for field in line.split("\t")]
        try:
            if len(fields) < 3:
                raise ValueError("fewer than 3 columns")
            number, labels = int(fields[0]), tuple(float(field) for field in fields[1:-1])
            if not 0 <= number < 1 << 64:
                raise ValueError(f"the id {number} is out of range")
        except ValueError as error:
            print(f"warning: {path}: line {line_number} left out, expected id, label and path between tabs ({error})",
                  file=sys.stderr)
            continue
        entries.append(Entry(len(entries), number, labels, fields[-1]))
    if not entries:
        raise UserError(f"{path}: no line of it has an id, a label and a path between tabs")
    return entries


def pack(path: Path, options: argparse.Namespace) -> None:
    """Write the record and index files of the list `path`. Raises UserError naming the first bad image.

    options: those of im2rec.py.
    """
    entries = read_list(path)
    output = Output(path, key(path, options))
    start = output.entries_done
    if start:
        print(f"continuing {path.with_suffix('.rec')} at record {start} of {len(entries)}")
    make = partial(payloads, options=options)
    workers = options.num_thread or cores()
    chunks = (entries[first:first + CHUNK] for first in range(start, len(entries), CHUNK))
    # Reading lets other threads work; decoding and encoding is done in processes.
    made = in_threads(make, chunks, workers) if options.pass_through and not options.verify else ordered_map(
        make, chunks, workers)
    bar = Progress(path.stem, len(entries), "images", initial=start)
    try:
        for chunk in made:
            for entry, payload in chunk:
                output.add(entry, payload, options)
            bar.advance(len(chunk))
    except BaseException:
        output.suspend()
        raise
    finally:
        bar.close()
    output.finish()
    skipped = f", {output.skipped} bad ones left out" if output.skipped else ""
    print(f"{path.with_suffix('.rec')}: {output.records} records, {output.size} bytes{skipped}")


def key(path: Path, options: argparse.Namespace) -> str:
    """Return what a stopped packing must agree on to be continued."""
    names = ("root", "pass_through", "resize", "center_crop", "quality", "color", "encoding", "pack_label", "verify",
             "skip_bad")
    settings = json.dumps([getattr(options, name) for name in names])
    return hashlib.sha256(settings.encode() + path.read_bytes()).hexdigest()


def in_threads(function: Callable, items: Iterator, workers: int) -> Iterator:
    """Yield function(item) in order, computed by threads, never more than two items a thread ahead."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ----------------------------------------------------------------------------------------------------------- images

def payloads(entries: Sequence[Entry], options: argparse.Namespace) -> list[tuple[Entry, bytes | Bad]]:
    """Return each entry with the bytes of its image as they are to be stored, or why there are none."""
    return [(entry, payload(os.path.join(options.root, entry.path), options)) for entry in entries]


def payload(path: str, options: argparse.Namespace) -> bytes | Bad:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        return Bad(f"{path} cannot be read ({error.strerror})")
    if options.pass_through and not options.verify:
        return data
    try:
        image = open_image(data, path)
    except UserError as error:
        return Bad(str(error))
    return data if options.pass_through else encode(transform(image, options), options)


def transform(image: Image.Image, options: argparse.Namespace) -> Image.Image:
    """Return the image as it is to be stored: gray or RGB, its central square, its shorter side resized."""
    if options.color >= 0:
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        image = image.convert("RGB" if options.color else "L")
    elif image.mode not in ("L", "RGB") and options.encoding == ".jpg":
        image = image.convert("RGB")
    if options.center_crop:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if options.resize:
        width, height = image.size
        size = (options.resize, height * options.resize // width) if height > width else (
            width * options.resize // height, options.resize)
        image = Image.fromarray(resize_bilinear(np.asarray(image), *size))
    return image


def resize_bilinear(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8 [H, W(, C)] by bilinear interpolation between the four nearest pixels, as OpenCV does by default.

    Nothing is smoothed before pixels are dropped, unlike Pillow's resize.
    """
    def neighbours(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = ((np.arange(wanted) + 0.5) * (size / wanted) - 0.5).clip(0, size - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)

    top, bottom, down = neighbours(pixels.shape[0], height)
    left, right, across = neighbours(pixels.shape[1], width)
    down = down.reshape(-1, *[1] * (pixels.ndim - 1))
    across = across.reshape(-1, *[1] * (pixels.ndim - 2))
    rows = pixels[top] * (1 - down) + pixels[bottom] * down
    return np.rint(rows[:, left] * (1 - across) + rows[:, right] * across).astype(np.uint8)


def encode(image: Image.Image, options: argparse.Namespace) -> bytes:
    stream = io.BytesIO()
    if options.encoding == ".png":
        image.save(stream, "PNG", compress_level=min(options.quality, 9))
    else:
        image.save(stream, "JPEG", quality=options.quality)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------ output

class Output:
    """The record file and its index on their way. `entries_done`: entries of the list that need not be done again."""

    def __init__(self, path: Path, key: str) -> None:
        self.final = path.with_suffix(".rec"), path.with_suffix(".idx")
        self.parts = tuple(file.with_name(f".{file.name}.part") for file in self.final)
        self.note, self.key = path.with_name(f".{path.stem}.part.json"), key
        self.entries_done, self.records, self.size, self.skipped = self._continued()
        self.files = [open(part, "r+b" if self.entries_done else "w+b", buffering=1 << 20) for part in self.parts]
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
        self.index_size = state["index_size"]
        return state["entries"], state["records"], state["size"], state["skipped"]

    def add(self, entry: Entry, payload: bytes | Bad, options: argparse.Namespace) -> None:
        """Append one record; UserError for a bad image unless they are to be skipped."""
        scalar = not (options.pack_label and len(entry.labels) > 1)
        pieces = None
        if not isinstance(payload, Bad):
            try:
                pieces = encode_record(entry.number, entry.labels, payload, scalar)
            except (ValueError, OverflowError) as error:
                payload = Bad(f"{entry.path}: {error}")
        if pieces is None:
            message = f"record {entry.place} (id {entry.number}): {payload.reason}"
            if not options.skip_bad:
                raise UserError(f"{message}; mend it, or leave bad ones out with --skip-bad")
            print(f"warning: {message}; left out", file=sys.stderr)
            self.skipped += 1
        else:
            self.index_size += self.files[1].write(f"{entry.number}\t{self.size}\n".encode())
            self.files[0].writelines(pieces)
            self.size += sum(map(len, pieces))
            self.records += 1
        self.entries_done += 1
        if time.monotonic() - self.noted > SECONDS_BETWEEN_NOTES:
            self._write_note()

    def _write_note(self) -> None:
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        with atomic(self.note, "w") as file:
            json.dump({"key": self.key, "entries": self.entries_done, "records": self.records, "size": self.size,
                       "index_size": self.index_size, "skipped": self.skipped}, file)
        self.noted = time.monotonic()

    def suspend(self) -> None:
        """Leave everything so that the same command continues."""
        self._write_note()
        for file in self.files:
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
        self.note.unlink(missing_ok=True)
