"""Reading pickles of unknown origin without running anything they bring along.

A pickle is a program that may call whatever it names. This reader knows exactly the names it is given and refuses every
other; there is no unsafe mode to fall back to.
"""
from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from shared.cli import UserError

Allowed = Mapping[tuple[str, str], Callable]


class _Reader(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], allowed: Allowed, source: str, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)
        self._allowed, self._source = allowed, source

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UserError(f"{self._source}: refused, it asks for {module}.{name}, which is not part of such a file; "
                            "nothing of it was run") from None


def restricted_load(stream: IO[bytes], allowed: Allowed, source: str, encoding: str = "latin1") -> Any:
    """Read one pickled object from `stream`, resolving only the (module, name) pairs in `allowed`.

    `source` names the file in messages. Raises UserError for any other name and for a file that is cut short or is
    not a pickle.
    """
    try:
        return _Reader(stream, allowed, source, encoding).load()
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
            OverflowError, MemoryError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cut short or not a file of this kind ({type(error).__name__}: {error})") from None


class _ArrayType:
    """Stands for numpy.ndarray, which itself would accept any shape and buffer."""


def _empty_array(kind: Any, shape: tuple[int, ...], typecode: bytes | str) -> np.ndarray:
    if kind is not _ArrayType or tuple(shape) != (0,):
        raise pickle.UnpicklingError("malformed array")
    return np.empty(0, np.uint8)  # its state, set next, brings shape and data


def _dtype(code: str, align: bool = False, copy: bool = True) -> np.dtype:
    dtype = np.dtype(code, align=bool(align), copy=bool(copy))
    if dtype.hasobject:
        raise pickle.UnpicklingError("arrays of objects are not read")
    return dtype


def _scalar(dtype: np.dtype, data: bytes | str) -> np.generic:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=dtype, count=1)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("unexpected text encoding")
    return text.encode("latin1")


def _from_buffer(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)


# Every spelling under which Python 2 and 3, NumPy 1 and 2 have written plain arrays and scalars.
NUMPY_NAMES: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


def load_numpy_pickle(data: bytes | IO[bytes], source: str) -> Any:
    """Read a pickle of dicts, lists, tuples, text, numbers and plain NumPy arrays, as the CIFAR batches are.

    Python 2 strings become str by latin1. Raises UserError for anything else.
    """
    stream = io.BytesIO(data) if isinstance(data, (bytes, bytearray, memoryview)) else data
    return restricted_load(stream, NUMPY_NAMES, source)
