"""Fingerprints of files, folders and arrays: the same fingerprint means the same content.

Neither the path nor a time counts, so a copied or moved file keeps its fingerprint. That of a path is remembered in the
cache folder, and computed anew when size, inode or a time of any file differs.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from shared.cli import UserError
from shared.training.files import cache_folder, walk_folders, write_text
from shared.training.progress import Progress

CHUNK = 1 << 22  # bytes read at a time
LONG = 1 << 28  # bytes from which on progress is shown
SETTLED_NS = 2_000_000_000  # what changed within this time may change again without another time stamp
DIGEST = re.compile("[0-9a-f]{32,128}")


def fingerprints(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> fingerprint of a program's inputs, by their name in messages ("--data").

    An input is a path or several, an ImageSet (anything with `images`, `labels` and `classes`), an array, or a digest
    in hexadecimal form; None is left out. Raises UserError for a path that is absent or cannot be read.
    """
    return {name: _fingerprint_input(name, value) for name, value in inputs.items() if value is not None}


def _fingerprint_input(name: str, value: Any) -> str:
    if hasattr(value, "images") and hasattr(value, "labels"):
        return fingerprint_arrays(value.images, value.labels, getattr(value, "vectors", None), value.classes)
    if isinstance(value, np.ndarray):
        return fingerprint_arrays(value)
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return value
    try:
        return fingerprint(*value) if isinstance(value, (list, tuple)) else fingerprint(value)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def fingerprint(*paths: str | os.PathLike) -> str:
    """Return 32 hexadecimal digits for the content of files and folders, in this order.

    A folder is the relative names and the contents of all files below it but hidden ones. Raises UserError for a path
    that is absent or cannot be read.
    """
    digests = [_remembered(Path(path), "content", _digest_files) for path in paths]
    return digests[0] if len(digests) == 1 else _combine(digests)


def fingerprint_files(folder: str | os.PathLike, names: Sequence[str]) -> str:
    """Return 32 hexadecimal digits for the names and contents of these files below a folder, in this order; UserError
    for one that cannot be read."""
    return _remembered(Path(folder), f"files {_combine(names)}", _digest_files, names)


def fingerprint_arrays(*parts: np.ndarray | Sequence[str] | None) -> str:
    """Return 32 hexadecimal digits for arrays and lists of names; those of arrays that map a file are remembered."""
    return _combine([_fingerprint_part(part) for part in parts])


def _fingerprint_part(part: np.ndarray | Sequence[str] | None) -> str:
    if not isinstance(part, np.ndarray):
        return json.dumps(part if part is None else list(map(str, part)))
    file = getattr(part, "filename", None)
    if file and part.flags.c_contiguous and part.offset + part.nbytes == os.path.getsize(file):
        content = _remembered(Path(file), "array", lambda *_: _digest_array(part))
    else:
        content = _digest_array(part)
    return f"{part.dtype.str} {part.shape} {content}"


def _digest_array(array: np.ndarray) -> str:
    digest, rows = hashlib.blake2b(digest_size=16), np.atleast_1d(array)
    step = max(1, CHUNK * len(rows) // max(1, rows.nbytes))
    for start in range(0, len(rows), step):
        digest.update(np.ascontiguousarray(rows[start:start + step]))
    return digest.hexdigest()


def _combine(parts: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------- files and folders

Files = Sequence[tuple[str, os.stat_result]]  # name below the folder ("" for a single file) and state


def _remembered(path: Path, kind: str, compute: Callable[[Path, Files], str],
                names: Sequence[str] | None = None) -> str:
    """Return the digest of this kind of the file or folder `path`, from the memory or computed now.

    names: only these files below the folder.
    """
    try:
        files = _files_below(path) if names is None else [(name, os.stat(path / name)) for name in names]
        state = _combine([f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
                          for name, stat in files])
        memory = cache_folder() / ".digests" / f"{_combine([kind, os.path.abspath(path)])}.txt"
        with suppress(OSError, ValueError):
            known, digest = memory.read_text(encoding="utf-8").split()
            if known == state and DIGEST.fullmatch(digest):
                return digest
        newest = max((max(stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in files), default=0)
        settled = time.time_ns() - newest > SETTLED_NS
        digest = compute(path, files)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    if settled:
        with suppress(OSError, UserError):  # a cache that cannot be written: it is computed again
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_text(memory, f"{state} {digest}\n")
    return digest


def _files_below(path: Path) -> Files:
    if not path.is_dir():
        return [("", path.stat())]
    found = []
    for folder, below, names in walk_folders(path, _refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        inside = Path(folder).relative_to(path).as_posix()
        above = "" if inside == "." else f"{inside}/"  # as text: a data set has many files
        found += [(above + name, os.stat(os.path.join(folder, name))) for name in names if not name.startswith(".")]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise error


def _digest_files(path: Path, files: Files) -> str:
    size = sum(stat.st_size for _, stat in files)
    progress = Progress(f"reading {path.name}", max(1, size // CHUNK), "x 4 MiB", shown=size > LONG)
    with closing(progress), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda entry: _digest_file(path / entry[0], progress), files))
    if not path.is_dir():
        return digests[0]
    return _combine([f"{digest} {name}" for digest, (name, _) in zip(digests, files, strict=True)])


def _digest_file(path: Path, progress: Progress) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.advance(len(chunk) // CHUNK)
    return digest.hexdigest()
