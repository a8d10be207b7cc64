"""Files of unknown origin: archives read in place with bounded sizes and counts, pickles that run nothing.

A ZIP or tar may hold names that point outside, links, or a few kilobytes that unfold to terabytes. A pickle is a
program that can call any function it names; this reader resolves an allow-list of names alone. A hostile file is
refused in one line before any of it is decoded.
"""
from __future__ import annotations

import gzip
import io
import os
import pickle
import stat
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from shared.cli import UserError, is_bounded

MAX_ENTRIES = 2_000_000         # ImageNet has 1.3 million images
MIN_BYTES_PER_ENTRY = 160       # both headers of an entry and the smallest PNG that holds a picture
MAX_MEMBER_BYTES = 1 << 28      # the largest image that is decoded, and a CIFAR-100 batch, take less
MAX_RATIO = 100                 # unpacked to packed; photographs reach 2, plain drawings 20
SMALL = 1 << 20                 # below this an entry may have any ratio
MAX_ARRAY_BYTES = 1 << 40       # an entry of an npz
MAX_TAR_ENTRIES = 10_000        # archives of batches hold less than ten
MAX_TAR_BYTES = 1 << 30
READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, struct.error,
               NotImplementedError, UnicodeDecodeError, ValueError)
Allowed = Mapping[tuple[str, str], Callable]


class Member(NamedTuple):
    """One file of a folder (`name` alone) or one entry of a ZIP."""

    name: str
    offset: int = -1            # of the entry's local header; -1: a file of its own
    packed: int = 0
    size: int = 0
    crc: int = 0
    method: int = zipfile.ZIP_STORED


# ----------------------------------------------------------------------------------------------------------- archives

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
            for i in infos if not i.is_dir()]


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
            yield read_file(path / member.name)
        return
    with open(path, "rb") as file:
        for member in members:
            try:
                yield _read_entry(file, member)
            except (struct.error, zlib.error, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: the entry {member.name} is damaged or cut short ({error}); get the file again"
                                ) from None


def read_file(path: str | os.PathLike) -> bytes:
    """Return the content of an image file; raise UserError, naming it."""
    try:
        if os.path.getsize(path) > MAX_MEMBER_BYTES:
            raise UserError(f"{path}: larger than {MAX_MEMBER_BYTES} bytes, which no image here should be")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _read_entry(file: IO[bytes], member: Member) -> bytes:
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


def read_gzip(path: Path) -> bytes:
    """Return the content of a file, unpacked if its name ends in .gz; raise UserError beyond MAX_MEMBER_BYTES."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(MAX_MEMBER_BYTES + 1)
    except READ_ERRORS as error:
        raise UserError(f"{path}: cut short or not readable ({error}); get it again") from None
    if len(data) > MAX_MEMBER_BYTES:
        raise UserError(f"{path}: refused, it unfolds to more than {MAX_MEMBER_BYTES} bytes")
    return data


# ---------------------------------------------------------------------------------------------------- pickles, arrays

def restricted_load(stream: IO[bytes], allowed: Allowed, source: str,
                    persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickled object from `stream`, resolving only the (module, name) pairs in `allowed`.

    `source` names the file in messages; `persistent_load` resolves references to data beside the pickle. Raises
    UserError for any other name and for a file that is cut short or is not a pickle.
    """
    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise UserError(f"{source}: refused, it asks for {module}.{name}, which is not part of such a file; "
                                "nothing of it was run")
            return allowed[module, name]

        def persistent_load(self, identity: Any) -> Any:
            if persistent_load is None:
                raise pickle.UnpicklingError("it refers to data outside of it")
            return persistent_load(identity)

    try:
        return Reader(stream, encoding="latin1").load()  # of Python 2
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
            OverflowError, MemoryError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cut short or not a file of this kind ({type(error).__name__}: {error}); get it "
                        "again") from None


class _ArrayType:
    """Stands for numpy.ndarray, which itself would accept any shape and buffer."""


class _DType:
    """A number type; what a pickle adds to it may only be the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc" or self.dtype.subdtype is not None:
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not read")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder({"|": "="}.get(state[1], state[1]))


class _Array:
    """An array in the making; its state brings type, shape and data."""

    value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C").value


def _empty_array(kind: Any, shape: tuple[int, ...], typecode: bytes | str) -> _Array:
    if kind is not _ArrayType:
        raise pickle.UnpicklingError("malformed array")
    return _Array()


def _raw(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _from_buffer(data: bytes | str, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.value = np.frombuffer(_raw(data), dtype=dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(dtype: _DType, data: bytes | str) -> Any:
    return np.frombuffer(_raw(data), dtype=dtype.dtype, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("unexpected text encoding")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # protocols below 3 spell empty bytes so


# Every spelling under which Python 2 and 3, NumPy 1 and 2 have written plain arrays and scalars.
NUMPY_NAMES: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


def load_numpy_pickle(data: bytes | IO[bytes], source: str) -> Any:
    """Read a pickle of dicts, lists, tuples, text, numbers and plain numeric arrays, as the CIFAR batches are.

    Python 2 strings become str by latin1; NumPy scalars become Python numbers. Raises UserError for anything else.
    """
    stream = io.BytesIO(data) if isinstance(data, (bytes, bytearray, memoryview)) else data
    content = restricted_load(stream, NUMPY_NAMES, source)
    if not is_bounded(content):
        raise UserError(f"{source}: refused, it unfolds to more than such a file holds")
    return _with_arrays(content)


def _with_arrays(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _with_arrays(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_arrays(item) for item in value)
    return value


class _AnyType(_DType):
    """A number type, or the type of arrays of objects."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        self.is_object = code in ("O8", "O4", "O")
        if not self.is_object:
            super().__init__(code, align, copy)

    def __setstate__(self, state: tuple) -> None:
        if not self.is_object:
            super().__setstate__(state)


class _AnyArray(_Array):
    """An array of numbers, or of objects, which becomes a list."""

    def __setstate__(self, state: tuple) -> None:
        if getattr(state[2], "is_object", False):
            self.value = _with_arrays(list(state[4]))
        else:
            super().__setstate__(state)


def _empty_any(kind: Any, shape: tuple[int, ...], typecode: bytes | str) -> _AnyArray:
    _empty_array(kind, shape, typecode)
    return _AnyArray()


OBJECT_NAMES = {**NUMPY_NAMES, ("numpy", "dtype"): _AnyType,
                **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_any for core in ("core", "_core")}}


def load_objects(path: str | os.PathLike) -> list[Any]:
    """Return the objects (numbers, text, plain arrays, lists of these) in an .npy file of an object array.

    Such a file is a pickle behind a header; nothing of it is run. Raises UserError for anything else.
    """
    try:
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else \
                np.lib.format.read_array_header_2_0
            if read_header(stream)[2] != np.dtype(object):
                raise ValueError("not an array of objects")
            content = restricted_load(stream, OBJECT_NAMES, os.fspath(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path}: cut short or not a file of this kind ({error})") from None
    if not isinstance(content, _AnyArray) or not isinstance(content.value, list) or not is_bounded(content.value):
        raise UserError(f"{path}: cut short or not a file of this kind")
    return content.value


def load_array(path: str | os.PathLike, source: str | None = None, names: Sequence[str] = ()) -> np.ndarray:
    """Return the numbers of an .npy file, or of an .npz file the first array called by one of `names`, else its only
    one; raise UserError, which calls the file `source`, for anything else."""
    source = source or os.fspath(path)
    try:
        if names and Path(path).suffix.lower() == ".npz":
            zip_members(Path(path), MAX_ARRAY_BYTES)
        array = np.load(path, allow_pickle=False)
        if names and isinstance(array, np.lib.npyio.NpzFile):
            with array as arrays:
                name = next((name for name in (*names, *arrays.files[:len(arrays.files) == 1])
                             if name in arrays.files), None)
                if name is None:
                    raise UserError(f"{source}: holds {', '.join(arrays.files[:8])}; expected `{names[0]}`")
                array = arrays[name]
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (*READ_ERRORS, SyntaxError, tokenize.TokenError, MemoryError) as error:
        raise UserError(f"{source}: cut short or not a plain array ({error}); make it again") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        raise UserError(f"{source}: expected an array of numbers")
    return array
