"""Arrays of numbers in MATLAB files (version 5), as SVHN is published, read within bounds.

Written from MathWorks' description of the format. scipy's reader can be made to leave its own memory by a damaged file.
"""
from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np

from shared.cli import UserError
from shared.data.archives import READ_ERRORS, SMALL

TYPES = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
MATRIX, COMPRESSED = 14, 15
MAX_NAME, MAX_DIMENSIONS = 64, 8
RATIO = 10                      # unpacked to packed; SVHN has 1.3


def read_mat(path: Path, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Return the `wanted` numeric arrays, in the types in which they are stored; UserError for a damaged file."""
    found: dict[str, np.ndarray] = {}
    try:
        most = max(SMALL, RATIO * path.stat().st_size)
        with open(path, "rb") as file:
            if file.read(128)[124:] != b"\0\1IM":
                raise ValueError("no header of MATLAB 5")
            while not set(wanted) <= found.keys():
                kind, size = struct.unpack("<II", _exactly(file, 8))
                end = file.tell() + size
                content = _Inflated(file, size) if kind == COMPRESSED else file
                if kind == COMPRESSED:
                    kind, _ = struct.unpack("<II", _exactly(content, 8))
                if kind == MATRIX and (named := _matrix(content, wanted, most)) is not None:
                    found[named[0]] = named[1]
                    if content is not file and content.readinto(memoryview(bytearray(8))):  # compares the checksum
                        raise ValueError("more follows a matrix")
                file.seek(end)
    except (*READ_ERRORS, MemoryError, KeyError, OverflowError) as error:
        raise UserError(f"{path}: cut short or not a MATLAB 5 file with {' and '.join(wanted)} ({error}); get it again"
                        ) from None
    return found


class _Inflated(io.RawIOBase):
    """The content of a compressed element of `size` bytes, at the place where the file is."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left, self.inflate = file, size, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.inflate.eof:
            packed = self.inflate.unconsumed_tail or self.file.read(min(self.left, 1 << 20))
            self.left -= 0 if self.inflate.unconsumed_tail else len(packed)
            data = self.inflate.decompress(packed, len(buffer))
            buffer[:len(data)] = data
            if data or not packed:
                return len(data)
        return 0


def _exactly(stream: IO[bytes], count: int) -> bytearray:
    """Return the next `count` bytes; EOFError if there are fewer."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = stream.readinto(view[done:])
        if not got:
            raise EOFError("cut short")
        done += got
    return data


def _element(stream: IO[bytes], most: int) -> np.ndarray:
    """Return the numbers of the next element, which may have `most` bytes, and pass over what pads it."""
    kind, size = struct.unpack("<II", _exactly(stream, 8))
    if kind >> 16:  # of four bytes at most: it lies in place of the size
        kind, size, data = kind & 0xFFFF, kind >> 16, struct.pack("<I", size)
        if size > 4:
            raise ValueError("malformed element")
        return np.frombuffer(data[:size], TYPES[kind])
    if size > most:
        raise ValueError(f"{size} bytes where {most} are the most that belong there")
    data = _exactly(stream, size)
    _exactly(stream, -size % 8)
    return np.frombuffer(data, TYPES[kind])


def _matrix(stream: IO[bytes], wanted: Collection[str], most: int) -> tuple[str, np.ndarray] | None:
    """Return (name, array) of a matrix, its first dimension the fastest in memory; None for one that is not wanted."""
    _element(stream, 8)  # flags
    shape = [int(length) for length in _element(stream, 4 * MAX_DIMENSIONS)]
    name = _element(stream, MAX_NAME).tobytes().decode("ascii")
    if name not in wanted:
        return None
    values = _element(stream, most)
    if min(shape, default=-1) < 0 or math.prod(shape) != len(values):
        raise ValueError(f"{len(values)} values in an array of {shape}")
    return name, values.reshape(shape, order="F")
