"""Reading pickles of unknown origin without running anything they bring along.

A pickle is a program that may call whatever it names. This reader knows exactly the names it is given and refuses every
other; there is no unsafe mode to fall back to.
"""
from __future__ import annotations

import io
import os
import pickle
import tokenize
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from shared.cli import UserError, is_bounded

Allowed = Mapping[tuple[str, str], Callable]


class _Reader(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], allowed: Allowed, source: str, encoding: str,
                 persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(stream, encoding=encoding)
        self._allowed, self._source, self._persistent = allowed, source, persistent

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UserError(f"{self._source}: refused, it asks for {module}.{name}, which is not part of such a file; "
                            "nothing of it was run") from None

    def persistent_load(self, identity: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("it refers to data outside of it")
        return self._persistent(identity)


def restricted_load(stream: IO[bytes], allowed: Allowed, source: str, encoding: str = "latin1",
                    persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickled object from `stream`, resolving only the (module, name) pairs in `allowed`.

    `source` names the file in messages; `persistent_load` resolves references to data beside the pickle. Raises
    UserError for any other name and for a file that is cut short or is not a pickle.
    """
    try:
        return _Reader(stream, allowed, source, encoding, persistent_load).load()
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
    """An array on its way; its state brings type, shape and data."""

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
    return b""  # how protocols below 3 spell empty bytes


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


def _finished(value: Any) -> Any:
    """Return `value` with every array in its containers in place of its stand-in."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _finished(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_finished(item) for item in value)
    return value


def load_array(path: str | os.PathLike, source: str | None = None) -> np.ndarray:
    """Return the numbers of an .npy file; UserError, which calls the file `source`, if it is none."""
    source = source or os.fspath(path)
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{source}: cut short or not a plain array ({error}); make it again") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        raise UserError(f"{source}: expected an array of numbers")
    return array


def load_numpy_pickle(data: bytes | IO[bytes], source: str) -> Any:
    """Read a pickle of dicts, lists, tuples, text, numbers and plain numeric arrays, as the CIFAR batches are.

    Python 2 strings become str by latin1; NumPy scalars become Python numbers. Raises UserError for anything else.
    """
    stream = io.BytesIO(data) if isinstance(data, (bytes, bytearray, memoryview)) else data
    content = restricted_load(stream, NUMPY_NAMES, source)
    if not is_bounded(content):
        raise UserError(f"{source}: refused, it unfolds to more than such a file holds")
    return _finished(content)
