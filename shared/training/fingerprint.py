"""What a file, a folder or an array holds, as a short text: the same text means the same content.

Neither names above it nor times count, so a copied or moved file keeps its fingerprint. That of a path is remembered in
the cache folder, and read anew when size, inode or a time of any file differs.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from shared.cli import UserError
from shared.training.files import atomic, cache_folder
from shared.training.progress import Progress

CHUNK = 1 << 22  # bytes read at a time
LONG = 1 << 28  # bytes from which on progress is shown
SETTLED_NS = 2_000_000_000  # a file that changed later than this ago may change again within the same time stamp
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
    digests = [_remembered(Path(path)) for path in paths]
    return digests[0] if len(digests) == 1 else _combine(digests)


def fingerprint_arrays(*parts: np.ndarray | Sequence[str] | None) -> str:
    """Return 32 hexadecimal digits for the contents of arrays and lists of names.

    That of an array which maps a whole file is remembered like that of a file.
    """
    return _combine([_fingerprint_part(part) for part in parts])


def _fingerprint_part(part: np.ndarray | Sequence[str] | None) -> str:
    if not isinstance(part, np.ndarray):
        return json.dumps(part if part is None else list(map(str, part)))
    file = getattr(part, "filename", None)
    whole = file and part.flags.c_contiguous and part.offset + part.nbytes == os.path.getsize(file)
    content = _remembered(Path(file), part) if whole else _digest_array(part)
    return f"{part.dtype.str} {part.shape} {content}"


def _digest_array(array: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    rows = max(1, CHUNK * len(array) // max(1, array.nbytes)) if array.ndim else 1
    for start in range(0, len(array), rows) if array.ndim else ():
        digest.update(np.ascontiguousarray(array[start:start + rows]))
    return digest.hexdigest() if array.ndim else _combine([repr(array.item())])


def _combine(parts: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(list(parts)).encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------------- files, folders

def _remembered(path: Path, array: np.ndarray | None = None) -> str:
    """Return the digest of the file or folder `path`, or of the `array` that maps it: remembered, or computed now."""
    try:
        files = list(_files(path))
        state = _combine([f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
                          for name, _, stat in files])
        kind = "content" if array is None else "array"
        memory = cache_folder() / ".digests" / f"{_combine([kind, os.path.abspath(path)])}.json"
        known = _read_memory(memory)
        if known.get("state") == state and DIGEST.fullmatch(str(known.get("digest"))):
            return known["digest"]
        newest = max((max(stat.st_mtime_ns, stat.st_ctime_ns) for _, _, stat in files), default=0)
        settled = time.time_ns() - newest > SETTLED_NS
        digest = _digest_files(path, files) if array is None else _digest_array(array)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    if settled:
        _write_memory(memory, {"state": state, "digest": digest})
    return digest


def _files(path: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Yield (relative name, path, state) of the file `path`, or of the files below it in sorted order."""
    if not path.is_dir():
        yield "", path, path.stat()
        return
    for folder, below, names in os.walk(path, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = Path(folder) / name
            yield file.relative_to(path).as_posix(), file, file.stat()


def _digest_files(path: Path, files: Sequence[tuple[str, Path, os.stat_result]]) -> str:
    size = sum(stat.st_size for _, _, stat in files)
    progress = Progress(f"reading {path.name}", max(1, size // CHUNK), "x 4 MiB", shown=size > LONG)
    with closing(progress), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda entry: _digest_file(entry[1], progress), files))
    if not path.is_dir():
        return digests[0]
    return _combine([f"{digest} {name}" for (name, _, _), digest in zip(files, digests, strict=True)])


def _digest_file(path: Path, progress: Progress) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if len(chunk) == CHUNK:
                progress.advance()
    return digest.hexdigest()


def _read_memory(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_memory(path: Path, content: Mapping[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, "w") as file:
            json.dump(content, file)
    except OSError:
        pass  # a cache that cannot be written: the content is read again next time
