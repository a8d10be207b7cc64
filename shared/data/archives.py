"""Archives of unknown origin, read in place: nothing is extracted, sizes and counts are bounded.

A ZIP or tar may hold names that point outside, links, or a few kilobytes that unfold to terabytes. Each is refused in
one line before anything of it is decoded.
"""
from __future__ import annotations

import gzip
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shared.cli import UserError

MAX_ENTRIES = 2_000_000         # ImageNet has 1.3 million images
MIN_BYTES_PER_ENTRY = 160       # both headers of an entry and the smallest PNG that holds a picture
MAX_MEMBER_BYTES = 1 << 28      # the largest image that is decoded, and a CIFAR-100 batch, take less
MAX_RATIO = 100                 # unpacked to packed; photographs reach 2, plain drawings 20
SMALL = 1 << 20                 # below this an entry may have any ratio
MAX_TAR_ENTRIES = 10_000        # of the archives of batches, which hold less than ten
MAX_TAR_BYTES = 1 << 30
READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, struct.error,
               NotImplementedError, UnicodeDecodeError, ValueError)


class Member(NamedTuple):
    """One file of a folder (`name` alone) or one entry of a ZIP."""

    name: str
    offset: int = -1            # of the entry's local header; -1: a file of its own
    packed: int = 0
    size: int = 0
    crc: int = 0
    method: int = zipfile.ZIP_STORED


def check_name(name: str, archive: Path) -> None:
    """Raise UserError for a name that would leave the archive's own folder on any system."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or ":" in name or "\0" in name:
        raise UserError(f"{archive}: refused, the entry name {name!r} points outside the archive")


def zip_members(path: Path, max_member: int = MAX_MEMBER_BYTES) -> list[Member]:
    """Return the files of a ZIP in archive order; raise UserError if it is damaged, hostile or beyond the limits."""
    size = path.stat().st_size
    try:
        entries = _entry_count(path, size)
        if entries > MAX_ENTRIES or entries > 10_000 and size < entries * MIN_BYTES_PER_ENTRY:
            raise UserError(f"{path}: refused, {entries} entries in {size} bytes are no set of images")
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except READ_ERRORS as error:
        raise UserError(f"{path}: cut short or not a ZIP ({error}); get it again") from None
    for info in infos:
        check_name(info.filename, path)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{path}: refused, the entry {info.filename!r} is a link")
        if info.flag_bits & 1:
            raise UserError(f"{path}: the entry {info.filename!r} is encrypted; repack it without a password")
        if info.file_size > max_member or info.file_size > max(SMALL, MAX_RATIO * info.compress_size):
            raise UserError(f"{path}: refused, the entry {info.filename!r} unfolds {info.compress_size} bytes to "
                            f"{info.file_size}")
    if sum(info.compress_size for info in infos) > size:
        raise UserError(f"{path}: refused, its entries overlap")
    if sum(info.file_size for info in infos) > max(SMALL, MAX_RATIO * size):
        raise UserError(f"{path}: refused, {size} bytes unfold to more than {MAX_RATIO} times as many")
    return [Member(i.filename, i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type)
            for i in infos if not i.is_dir() and not i.filename.startswith("__MACOSX/")]


def _entry_count(path: Path, size: int) -> int:
    """Return how many entries the ZIP's directory has room for, without reading that directory."""
    with open(path, "rb") as file:
        file.seek(max(0, size - 65_557))
        tail = file.read()
        end = tail.rfind(b"PK\5\6")
        if end < 0 or len(tail) < end + 22:
            raise zipfile.BadZipFile("no end-of-archive record")
        count, directory = struct.unpack("<HI", tail[end + 10:end + 16])
        locator = tail[max(0, end - 20):end]
        if locator[:4] == b"PK\6\7":
            file.seek(struct.unpack("<Q", locator[8:16])[0])
            count, directory = struct.unpack("<QQ", file.read(48)[32:48])
    return max(count, directory // 128)


def read_members(path: Path, members: Sequence[Member]) -> Iterator[bytes]:
    """Yield the content of each member of the folder or ZIP at `path`, one at a time, checked by its CRC."""
    if not members or members[0].offset < 0:
        for member in members:
            yield _read_file(path / member.name)
        return
    with open(path, "rb") as file:
        for member in members:
            try:
                yield _read_entry(file, member)
            except (struct.error, zlib.error, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: the entry {member.name} is damaged or cut short ({error}); get the file again"
                                ) from None


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise UserError(f"{path}: larger than {MAX_MEMBER_BYTES} bytes, which no image here should be")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _read_entry(file, member: Member) -> bytes:
    file.seek(member.offset)
    header = file.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    file.seek(name + extra, os.SEEK_CUR)
    data = file.read(member.packed)
    if member.method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    elif member.method != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile("packed by a method other than store or deflate: repack it")
    if header[:4] != b"PK\3\4" or len(data) != member.size or zlib.crc32(data) != member.crc:
        raise zipfile.BadZipFile("the content does not match its checksum")
    return data


def read_tar(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the `wanted` regular files of a tar, in archive order, in one pass."""
    unpacked = 0
    try:
        with tarfile.open(path) as archive:
            for count, member in enumerate(archive):
                check_name(member.name, path)
                unpacked += member.size
                if count > MAX_TAR_ENTRIES or member.size > MAX_MEMBER_BYTES or unpacked > MAX_TAR_BYTES:
                    raise UserError(f"{path}: refused at {member.name!r}, it unfolds to more than such a file holds")
                if not (member.isfile() or member.isdir()):
                    raise UserError(f"{path}: refused, the entry {member.name!r} is a link or a device")
                if member.isfile() and member.name in wanted:
                    yield member.name, archive.extractfile(member).read()
    except READ_ERRORS as error:
        raise UserError(f"{path}: cut short or not a tar archive ({str(error).partition(chr(10))[0]}); get it again"
                        ) from None


def read_gzip(path: Path, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Return the content of a file, unpacked if its name ends in .gz; raise UserError beyond `limit` bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(limit + 1)
    except READ_ERRORS as error:
        raise UserError(f"{path}: cut short or not readable ({error}); get it again") from None
    if len(data) > limit:
        raise UserError(f"{path}: refused, it unfolds to more than {limit} bytes")
    return data
