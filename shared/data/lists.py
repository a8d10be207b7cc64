"""Lists that people write: a line an entry. Labels of images as CSV, names of classes, splits.

Lines are UTF-8 with or without a byte order mark, with any line end. Names may hold spaces.
"""
from __future__ import annotations

import csv
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from shared.cli import UserError

MAX_LIST_BYTES = 1 << 30
FILE_COLUMNS, LABEL_COLUMNS = ("file", "filename", "file_name", "path", "image"), ("label", "class", "class_name")
SEPARATORS = ",;\t"
UNKNOWN = frozenset(("", "nan", "none", "null", "na", "n/a"))  # how tables say that there is no label


def read_text(path: str | os.PathLike, what: str = "a list") -> str:
    """Return the text of a file; UserError, naming it, unless it is UTF-8 text."""
    try:
        if os.path.getsize(path) > MAX_LIST_BYTES:
            raise UserError(f"{path}: larger than {MAX_LIST_BYTES} bytes, which is not {what}")
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {what}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected {what}, one entry a line") from None
    if "\0" in text:
        raise UserError(f"{path}: a binary file; expected {what}, one entry a line")
    return text


def read_lines(path: str | os.PathLike, what: str = "a list") -> list[tuple[int, str]]:
    """Return (line number from 1, text without the blanks around it) of every line that is not blank; UserError."""
    lines = read_text(path, what).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_class_names(path: str | os.PathLike, folders: Collection[str] = ()) -> tuple[str, ...]:
    """Return the class names of a list in label order, one a line.

    A line is a name, such as `great grey owl`, or a name and words about it, such as `n01440764 tench, Tinca tinca`:
    the lines are names if all of `folders` are among them, else their first words are. Raises UserError for an empty
    list and for a name that stands there twice.
    """
    lines = [line for _, line in read_lines(path, "a list of class names")]
    names = lines if set(folders) <= set(lines) else [line.split()[0] for line in lines]
    if not names:
        raise UserError(f"{path}: holds no class names; expected one a line")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise UserError(f"{path}: names the class {twice!r} twice; expected each on one line")
    return tuple(names)


class LabelTable(NamedTuple):
    """Labels of images by file. files: as listed, with forward slashes. labels: a name or number; None: unknown."""

    files: tuple[str, ...]
    labels: tuple[str | None, ...]


def read_label_csv(path: str | os.PathLike) -> LabelTable:
    """Read a CSV with the columns `file` and `label`, among others (commas, semicolons or tabs).

    Without a header it must have these two columns alone. An empty label is unknown. Labels that are all whole numbers,
    as `3` or `3.0`, are class numbers. A file may stand there twice with one label. Raises UserError, naming the line.
    """
    source = Path(path)
    lines = read_text(source, "a CSV of files and labels").splitlines()
    first = next((line for line in lines if line.strip()), "")
    separator = max(SEPARATORS, key=first.count)
    rows = [(number, row) for number, row in enumerate(csv.reader(lines, delimiter=separator), 1) if any(row)]
    if not rows:
        raise UserError(f"{source}: is empty; expected a header `file,label` and one line an image")
    header = [name.strip().lower() for name in rows[0][1]]
    places = [next((header.index(name) for name in names if name in header), None)
              for names in (FILE_COLUMNS, LABEL_COLUMNS)]
    if places == [None, None] and len(header) == 2:
        places = [0, 1]
    elif None in places:
        missing = "file" if places[0] is None else "label"
        raise UserError(f"{source}: has no column `{missing}` (only {', '.join(filter(None, header[:8]))}); expected a "
                        "header `file,label`")
    else:
        rows = rows[1:]

    found: dict[str, tuple[int, str | None]] = {}
    for number, row in rows:
        if len(row) <= max(places):
            raise UserError(f"{source}: line {number} has {len(row)} columns, expected a file and a label")
        file, text = (row[place].strip() for place in places)
        label = None if text.lower() in UNKNOWN else text
        file = os.path.normpath(file.replace("\\", "/")) if file else ""
        if not file:
            raise UserError(f"{source}: line {number} names no file")
        if file in found and found[file][1] != label:
            line, former = found[file]
            raise UserError(f"{source}: lists {file} twice, as {former} in line {line} and as {label} in line {number}")
        found[file] = number, label
    return LabelTable(tuple(found), _whole_numbers([label for _, label in found.values()]))


def _whole_numbers(labels: list[str | None]) -> tuple[str | None, ...]:
    """Return labels such as 3.0, which tables with gaps have, as 3, if all known ones are whole numbers."""
    known = [label for label in labels if label is not None]
    try:
        if not all(float(label).is_integer() and float(label) >= 0 for label in known):
            return tuple(labels)
    except (ValueError, OverflowError):
        return tuple(labels)
    return tuple(label if label is None else str(int(float(label))) for label in labels)
