"""Which files of a folder or ZIP are images, and what is left out: hidden and system files, and what is no image."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

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
