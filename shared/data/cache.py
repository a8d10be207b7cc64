"""Decoded images kept as flat arrays: decoded once, then opened memory-mapped in milliseconds. Large arrays that
several ranks fill row by row: memory-mapped, and continued where a killed run has left them.

The cache is the folder $FEWLABEL_CACHE (default ~/.cache/fewlabel), at most $FEWLABEL_CACHE_GB gigabytes (default 32;
the least recently used entries go first). It may be deleted at any time.
"""
from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from shared import distributed
from shared.cli import UserError
from shared.distributed import World
from shared.training.files import cache_folder, hold, make_dir, write_array
from shared.training.progress import Progress

FORMAT = 3
DEFAULT_GB = 32.0
DAY = 86_400.0


@dataclass(frozen=True, eq=False)
class Stored:
    """A decoded set. images: uint8 [N, C, H, W]; labels: int64 [N], -1 unknown; vectors: float32 [N, D].

    notes: warnings, repeated whenever the set is opened.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] = ()
    vectors: np.ndarray | None = None
    notes: tuple[str, ...] = ()


Allocate = Callable[[tuple[int, ...]], np.ndarray]  # shape -> uint8 array, on disk
Build = Callable[[Allocate], Stored]


def cached(name: str, key: object, build: Build, source: str | os.PathLike = "") -> Stored:
    """Return the result of `build` for this `key`, from the cache or computed now.

    `key` is anything JSON can hold. `build` gets a function that allocates the image array on disk. Processes that ask
    for the same key at the same time wait for the first of them. If the cache cannot be written, a warning says so and
    the arrays lie in a temporary file. `source`: what the warnings about the data name.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, key]).encode()).hexdigest()[:20]
    root = cache_folder()
    entry = root / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}-{digest}"
    stored = _load(entry) or _make(root, entry, build, f".{digest}.lock")
    for note in stored.notes:
        warnings.warn(f"{source or name}: {note}", stacklevel=2)
    return stored


def _make(root: Path, entry: Path, build: Build, lock: str) -> Stored:
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = hold(root / lock, wait=True)
    except OSError as error:
        warnings.warn(f"cannot write the cache {root} ({error}): the images are decoded again at the next start; "
                      "name a writable folder in FEWLABEL_CACHE", stacklevel=3)
        with tempfile.TemporaryDirectory(prefix="fewlabel-") as folder:
            _write(Path(folder), build)
            return _load(Path(folder))  # the mapped files outlive their names
    with held:
        folder = Path(tempfile.mkdtemp(prefix=".part-", dir=root))
        try:
            if (stored := _load(entry)) is not None:
                return stored
            _write(folder, build)
            shutil.rmtree(entry, ignore_errors=True)  # a damaged former one
            os.rename(folder, entry)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            (root / lock).unlink(missing_ok=True)
    with suppress(OSError):  # another process may be removing the same
        _shrink(root)
    return _load(entry)


def _write(folder: Path, build: Build) -> None:
    """Let `build` fill the folder. Raises UserError if the disk is full."""

    def allocate(shape: tuple[int, ...]) -> np.ndarray:
        try:
            images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a bus error later
                with open(folder / "images.npy", "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot reserve space
                raise _no_room(folder, error) from None
        return images

    try:
        stored = build(allocate)
    except OSError as error:
        raise UserError(f"cannot read the images: {error}") from None
    try:
        stored.images.flush()
        facts = {"labels": stored.labels, "classes": np.array(stored.classes, np.str_),
                 "notes": np.array(stored.notes, np.str_)}
        np.savez(folder / "facts.npz", **facts, **({} if stored.vectors is None else {"vectors": stored.vectors}))
    except OSError as error:
        raise _no_room(folder, error) from None


def _no_room(folder: Path, error: OSError) -> UserError:
    return UserError(f"no room for the decoded images in {folder.parent} ({error.strerror}): free space, or name a "
                     "folder on another disk in FEWLABEL_CACHE")


def _load(entry: Path) -> Stored | None:
    """Return the entry, or None if it is absent or damaged."""
    try:
        # Copy-on-write: writable for PyTorch, which warns otherwise, while the file stays as it is.
        images = np.load(entry / "images.npy", mmap_mode="c")
        with np.load(entry / "facts.npz") as facts:
            stored = Stored(images, facts["labels"], tuple(facts["classes"].tolist()), facts.get("vectors"),
                            tuple(facts["notes"].tolist()))
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None
    with suppress(OSError):  # a cache shared read-only
        os.utime(entry)
    return stored


def _shrink(root: Path) -> None:
    """Remove the least recently used entries until the rest fits, and leftovers of killed processes."""
    given = os.environ.get("FEWLABEL_CACHE_GB") or str(DEFAULT_GB)
    try:
        limit = float(given) * 1e9
        if not 0 <= limit < math.inf:
            raise ValueError
    except ValueError:
        raise UserError(f"FEWLABEL_CACHE_GB must be a number of gigabytes, got {given!r}") from None
    for left in root.glob(".part-*"):
        if time.time() - left.stat().st_mtime > DAY:
            shutil.rmtree(left, ignore_errors=True)
    entries = sorted((e for e in root.iterdir() if e.is_dir() and not e.name.startswith(".")),
                     key=lambda e: e.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(f.stat().st_size for f in entry.iterdir())
        if total > limit:
            shutil.rmtree(entry, ignore_errors=True)  # mapped files stay readable where they are open


# ---------------------------------------------------------------- arrays that several ranks fill

Rows = Mapping[str, np.ndarray]  # name -> rows [n, ...]


def rank_part(count: int, world: World) -> slice:
    """Return this rank's contiguous part of `count` rows; parts differ by one row at most."""
    return slice(count * world.rank // world.size, count * (world.rank + 1) // world.size)


def fill_arrays(paths: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]],
                make: Callable[[Sequence[np.ndarray]], Iterator[Rows]], batch: int, world: World, desc: str,
                dtype: type = np.float32) -> None:
    """Make .npy files of equally many rows, every rank its part of them.

    make: row numbers of each batch, int64 [n] with n <= batch -> the rows of each batch by file. A file gets its name
    when it is complete. Before, it is <name>.part.npy, in which missing rows are NaN: a killed run's rows stay, on any
    number of ranks.
    """
    parts = {name: path.with_name(f"{path.stem}.part.npy") for name, path in paths.items()}
    if world.main:
        for name, path in parts.items():
            _create(path, shapes[name], dtype)
    distributed.barrier(world)
    arrays = {name: np.lib.format.open_memmap(path, "r+") for name, path in parts.items()}
    own = rank_part(next(iter(shapes.values()))[0], world)
    # A sum is NaN if any number of its row is.
    missing = [np.isnan(array[own].reshape(own.stop - own.start, -1).sum(1)) for array in arrays.values()]
    items = own.start + np.flatnonzero(np.any(missing, axis=0))
    wanted = [items[start:start + batch] for start in range(0, len(items), batch)]
    bar = Progress(desc, len(items), "images", shown=world.main)
    for rows, made in zip(wanted, make(wanted), strict=True):
        for name, values in made.items():
            arrays[name][rows] = values
        bar.advance(len(rows))
    bar.close()
    for array in arrays.values():
        array.flush()
    distributed.barrier(world)
    if world.main:
        for name, path in paths.items():
            os.replace(parts[name], path)
    distributed.barrier(world)


def _create(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    """Make an array of NaN, unless one of this shape exists."""
    make_dir(path.parent)
    try:
        found = np.load(path, mmap_mode="r")
        if found.shape == shape and found.dtype == dtype:
            return
    except (ValueError, EOFError, OSError):
        pass  # none yet, or cut short
    write_array(path, np.broadcast_to(dtype("nan"), shape))
