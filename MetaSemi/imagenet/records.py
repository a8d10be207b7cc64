"""RecordIO files of images (`.rec` with its `.idx`), the format of MXNet that NVIDIA DALI reads too: written and read.

A record is cut into parts wherever its content holds the magic word at a multiple of four bytes; a part is the magic
word, a word with how the part continues (3 bits) and its length (29 bits), and the data. Zeros fill the record up to a
multiple of four bytes. The content is a header, float labels if there are several, and the payload.
"""
from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.cli import UserError
from shared.data.classes import match_labels
from shared.data.listing import read_lines
from shared.training.files import write_text

MAGIC_NUMBER = 0xCED7230A
MAGIC = struct.pack("<I", MAGIC_NUMBER)
WHOLE, FIRST, MIDDLE, LAST = range(4)   # how a part continues
MAX_CONTENT = 1 << 29
PART = struct.Struct("<4sI")
HEADER = struct.Struct("<IfQQ")         # number of labels after the header (0: the one in it), label, id, second id
CHECKED_AT_START = 2_000                # records whose heads are looked at when a file is opened


def encode_record(number: int, labels: Sequence[float], payload: bytes, scalar: bool) -> list[bytes | memoryview]:
    """Return the pieces of one record, to be written one after another.

    number: the record's id. labels: as many as wanted; `scalar`: keep only the first, inside the header. Raises
    ValueError for more than 2^29 - 1 bytes of content.
    """
    if scalar:
        head = HEADER.pack(0, labels[0], number, 0)
    else:
        head = HEADER.pack(len(labels), 0.0, number, 0) + struct.pack(f"<{len(labels)}f", *labels)
    size = len(head) + len(payload)
    if size >= MAX_CONTENT:
        raise ValueError(f"{len(payload)} bytes are too many for a record")
    parts = split_content(head + payload)
    kinds = [FIRST] + [MIDDLE] * (len(parts) - 2) + [LAST] if len(parts) > 1 else [WHOLE]
    pieces: list[bytes | memoryview] = []
    for kind, part in zip(kinds, parts, strict=True):
        pieces += [PART.pack(MAGIC, kind << 29 | len(part)), part]
    return [*pieces, bytes(-size % 4)]


def split_content(content: bytes) -> list[memoryview]:
    """Cut content at every magic word that begins at a multiple of four bytes; the words themselves are dropped."""
    view, parts, start = memoryview(content), [], 0
    words = np.frombuffer(content, "<u4", count=len(content) // 4)  # much quicker than bytes.find
    for at in (4 * np.flatnonzero(words == MAGIC_NUMBER)).tolist():
        parts.append(view[start:at])
        start = at + 4
    return [*parts, view[start:]]


@dataclass(frozen=True)
class Record:
    """One record: its id, its labels and the bytes of its image."""

    number: int
    labels: tuple[float, ...]
    payload: bytes


class Damaged(UserError):
    """A record that cannot be read."""


class RecordFile:
    """The records of `<path>.rec`, by position in the file; `<path>.idx` says where each begins.

    Opening checks that the two belong together (in large files: the ends, and 2,000 records between them); reading
    checks each record. skip_bad: leave records out that opening finds damaged; `skipped` says which.
    Raises UserError naming file and record: files missing or empty, a wrong index, records cut short. Reading is safe
    from several threads and processes at once.

    classes: names in label order, of `<path>.synset.txt`; () without that file.
    """

    def __init__(self, path: str | os.PathLike, skip_bad: bool = False) -> None:
        self.path = Path(path).with_suffix(".rec")
        self.skipped: list[str] = []
        index = self.path.with_suffix(".idx")
        for file in (self.path, index):
            if not file.is_file():
                raise UserError(f"{file}: no such file; expected the files that im2rec.py writes")
        self.classes, self.renumbered = read_synset(self.path), None
        self.ids, self.starts = read_index(index)
        self.file = os.open(self.path, os.O_RDONLY)
        self.size = os.fstat(self.file).st_size
        self.ends = np.append(self.starts[1:], max(self.size, int(self.starts[-1])))
        self.numbers = np.arange(len(self.starts))
        self._check(skip_bad)

    def __len__(self) -> int:
        return len(self.numbers)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)

    def name(self, position: int) -> str:
        """Return the name of a record in messages: its number in the file, from 0, and its id."""
        number = int(self.numbers[position])
        return f"{self.path}: record {number} (id {self.ids[number]})"

    def read(self, position: int) -> Record:
        """Return a record; raises Damaged."""
        number = int(self.numbers[position])
        start, end = int(self.starts[number]), int(self.ends[number])
        data = os.pread(self.file, end - start, start)
        content = b"".join(self._parts(data, position, end))
        if len(content) < HEADER.size:
            raise Damaged(f"{self.name(position)} holds {len(content)} bytes, too few for a header")
        count, label, identity, _ = HEADER.unpack_from(content)
        first = HEADER.size + 4 * count
        if first > len(content):
            raise Damaged(f"{self.name(position)} says that it has {count} labels, more than it can hold")
        labels = struct.unpack_from(f"<{count}f", content, HEADER.size) if count else (label,)
        return Record(identity, labels, content[first:])

    def get(self, position: int) -> tuple[bytes, float]:
        """Return image and label of a record, of several labels the first, -1 without any; raises Damaged.

        The label is the number that the class has in `match_classes`.
        """
        record = self.read(position)
        label = record.labels[0] if record.labels else -1.0
        if self.renumbered is not None and 0 <= label < len(self.renumbered) and label == int(label):
            label = float(self.renumbered[int(label)])
        return record.payload, label

    def match_classes(self, classes: Sequence[str]) -> None:
        """Let labels be numbers of the same names in `classes`; UserError for other classes."""
        own = np.arange(len(self.classes))
        matched = match_labels(own, self.classes, classes, synset_file(self.path))
        self.renumbered = None if np.array_equal(own, matched) else matched

    def has_one_label(self) -> bool:
        """Return whether all records, or 2,000 of many, have the same label."""
        positions = np.unique(np.linspace(0, len(self) - 1, min(len(self), CHECKED_AT_START)).astype(int)).tolist()
        return len({self.get(position)[1] for position in positions}) == 1

    def _parts(self, data: bytes, position: int, end: int) -> Iterator[bytes]:
        at, kind = 0, FIRST
        while kind in (FIRST, MIDDLE):
            if at + PART.size > len(data):
                raise self._unlike(position, end)
            magic, word = PART.unpack_from(data, at)
            expected = (WHOLE, FIRST) if at == 0 else (MIDDLE, LAST)
            kind, length = word >> 29, word & (MAX_CONTENT - 1)
            if magic != MAGIC or kind not in expected:
                raise Damaged(f"{self.name(position)}: no record begins at byte {self.starts[self.numbers[position]]}; "
                              "the index does not match the record file")
            if at:
                yield MAGIC
            first = at + PART.size
            at = first + length
            if at > len(data):
                raise self._unlike(position, end)
            yield data[first:at]
        if at + (-at % 4) > len(data):  # without its padding
            raise self._unlike(position, end)
        if at + (-at % 4) < len(data):
            raise Damaged(f"{self.name(position)} ends {len(data) - at} bytes before the next one in the index; the "
                          "index does not match the record file")

    def _unlike(self, position: int, end: int) -> Damaged:
        if end >= self.size:
            return Damaged(f"{self.name(position)} is cut short: the file ends at byte {self.size}")
        return Damaged(f"{self.name(position)} goes on behind byte {end}, where the index has the next one; the index "
                       "does not match the record file")

    def _check(self, skip_bad: bool) -> None:
        count = len(self.numbers)
        looked_at = np.unique(np.linspace(0, count - 1, min(count, CHECKED_AT_START)).astype(int))
        beyond = np.flatnonzero(self.starts >= self.size)
        bad = {}
        for position in np.union1d(looked_at, beyond).tolist():
            try:
                self._check_one(position)
            except Damaged as error:
                if not skip_bad:
                    raise
                bad[position] = str(error)
        if int(self.starts[0]) and not bad:
            message = f"{self.path}: its index begins at byte {self.starts[0]} and not at 0: some records are missing"
            if not skip_bad:
                raise UserError(message)
            self.skipped.append(message)
        self.skipped += bad.values()
        self.numbers = np.delete(self.numbers, list(bad))
        if not len(self.numbers):
            raise UserError(f"{self.path}: none of its {count} records can be read; {self.skipped[0]}")

    def _check_one(self, position: int) -> None:
        """Check the heads of a record's parts without reading its data; raises Damaged."""
        start, end = int(self.starts[position]), int(self.ends[position])
        if start >= self.size:
            raise Damaged(f"{self.name(position)} is cut short: the index has it at byte {start}, the file ends at "
                          f"byte {self.size}")
        magic, word = PART.unpack(os.pread(self.file, PART.size, start).ljust(PART.size))
        length = word & (MAX_CONTENT - 1)
        whole = PART.size + length + (-length % 4)
        if magic != MAGIC or word >> 29 != WHOLE or start + whole != end or end > self.size:
            self.read(position)  # names the damage, if any; a record of several parts may be whole


def synset_file(path: Path) -> Path:
    """Return the file of class names beside a list or record file."""
    return path.with_suffix(".synset.txt")


def write_synset(path: Path, names: Sequence[str]) -> None:
    """Write the names of the classes beside a list or record file, one a line in label order."""
    write_text(synset_file(path), "".join(f"{name}\n" for name in names))


def read_synset(path: Path) -> tuple[str, ...]:
    """Return the names of the classes beside a list or record file, in label order; () if there are none."""
    file = synset_file(path)
    return tuple(name for _, name in read_lines(file, "a list of class names")) if file.is_file() else ()


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and byte offsets, int64 [N] each, of an index file, by offset; UserError."""

    content = path.read_bytes()
    lines = sum(1 for line in content.splitlines() if line.strip())
    if not lines:
        raise UserError(f"{path}: the index is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what numpy says where it meets something else than numbers
            table = np.fromstring(content, dtype=np.int64, sep=" ")
    except (ValueError, OverflowError, DeprecationWarning):
        table = np.zeros(0, np.int64)
    if len(table) != 2 * lines or (table < 0).any() or (table == np.iinfo(np.int64).max).any():
        raise UserError(f"{path}: not an index; expected an id and a byte offset on every line")
    table = table.reshape(lines, 2)
    order = np.argsort(table[:, 1], kind="stable")
    ids, starts = table[order].T
    repeated = np.flatnonzero(np.diff(starts) == 0)
    if len(repeated):
        raise UserError(f"{path}: records {repeated[0]} and {repeated[0] + 1} both begin at byte {starts[repeated[0]]}")
    return ids, starts
