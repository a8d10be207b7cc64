"""The images among the files of a folder or ZIP, and readers of lists: labels, classes, names."""
from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shared.cli import UserError
from shared.data.safe import Member, read_members
from shared.training.files import walk_folders

LABEL_FILE = "dataset.json"
LABEL_TABLES = ("labels.csv", "label_these.csv")
NO_STRAY_FILES = frozenset((LABEL_FILE, *LABEL_TABLES, "generate.json"))  # they say what the images are
# PostScript would start another program; the others need decoders that Pillow does not have.
NOT_DECODED = frozenset(("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"))
# How files of the usual formats begin, for those without an ending.
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*",
              b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
# Resource forks of macOS, thumbnails and bins of Synology, QNAP and Windows, what fsck found.
SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information",
                            "lost+found"))


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file name endings, in lower case, that Pillow decodes by itself."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN
                     and kind not in NOT_DECODED)


def is_image(name: str) -> bool:
    """Return whether a relative path names an image: by its ending, and neither hidden nor in a system folder."""
    return os.path.splitext(name)[1].lower() in image_suffixes() and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether a relative path is hidden or in a folder of the operating system."""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in name.split("/"))


def is_image_file(path: Path, member: Member) -> bool:
    """Return whether a file of a folder or ZIP is an image: by its ending, or without one by its content."""
    if os.path.splitext(member.name)[1] or is_hidden(member.name):
        return is_image(member.name)
    if member.offset >= 0:
        return member.size > 0 and begins_as_image(next(read_members(path, [member])))
    try:
        with open(path / member.name, "rb") as file:
            return begins_as_image(file.read(32))
    except OSError:
        return False


def begins_as_image(content: bytes) -> bool:
    """Return whether a file begins as JPEG, PNG, GIF, BMP, TIFF, JPEG 2000 or WebP."""
    is_bmp, is_webp = content[:2] == b"BM" and content[6:10] == bytes(4), content[8:12] == b"WEBP"
    return content.startswith(BEGINNINGS) or is_bmp or content[:4] == b"RIFF" and is_webp


def left_out(found: Sequence[Member], images: Sequence[Member], prefix: str) -> str:
    """Return a line on the files that are no images, or are hidden though their name is that of one; '' for none."""
    taken = {member.name for member in images}
    others = sorted(member.name for member in found if member.name not in taken and member.name.startswith(prefix)
                    and member.name.rpartition("/")[2] not in NO_STRAY_FILES)
    system = [name for name in others if any(part in SYSTEM_FOLDERS for part in name.split("/"))]
    hidden = [name for name in others if is_hidden(name) and name not in set(system) and
              ("/." in f"/{name}".rpartition("/")[0] or os.path.splitext(name)[1].lower() in image_suffixes())]
    stray = [name for name in others if not is_hidden(name)]
    kinds = [(hidden, "hidden"), (system, "in system folders"), (stray, "that are no images by name or content")]
    said = [f"{len(names)} {kind} (first: {names[0]})" for names, kind in kinds if names]
    return f"files left out: {', '.join(said)}" if said else ""


def walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files below `folder`, with forward slashes, in no particular order.

    Links are followed, but not back up to a folder that they lie in.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"cannot read the folder {folder}")
    for root, _, names in walk_folders(folder):
        inside = os.path.relpath(root, folder).replace(os.sep, "/") + "/"
        for name in names:
            yield name if inside == "./" else inside + name


# -------------------------------------------------------------------------------------------- lists that people write

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
