"""Decoded images kept as flat arrays: decoded once, then opened memory-mapped in milliseconds.

The cache is the folder $FEWLABEL_CACHE (default ~/.cache/fewlabel), at most $FEWLABEL_CACHE_GB gigabytes (default 32;
what was not used for longest goes first). It may be deleted at any time.
"""
from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.cli import UserError
from shared.training.files import cache_folder, hold

FORMAT = 1
DEFAULT_GB = 32.0
DAY = 86_400.0


@dataclass(frozen=True, eq=False)
class Stored:
    """What a reader found. images: uint8 [N, C, H, W]; labels: int64 [N], -1 unknown; vectors: float32 [N, D].

    notes: what the reader has to say about the data, said again at each start.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] = ()
    vectors: np.ndarray | None = None
    notes: tuple[str, ...] = ()


Allocate = Callable[[tuple[int, ...]], np.ndarray]  # shape -> uint8 array, on disk
Build = Callable[[Allocate], Stored]


class _NoRoom(Exception):
    """The folder cannot hold the arrays."""


def fingerprint(*paths: Path) -> list[tuple[str, int, int]]:
    """Return what changes when a file, or any file below a folder, does: absolute path, size, time of change in ns."""
    found = []
    for path in paths:
        top = os.path.abspath(path)
        files = [os.path.join(root, name) for root, _, names in os.walk(top, followlinks=True) for name in names]
        for file in sorted(files) if os.path.isdir(top) else [top]:
            state = os.stat(file)
            found.append((file, state.st_size, state.st_mtime_ns))
    return found


def cached(name: str, key: object, build: Build) -> Stored:
    """Return what `build` made for this `key`, from the cache or by calling it now.

    `key` is anything JSON can hold. `build` gets a function that allocates the image array on disk. Processes that ask
    for the same key at the same time wait for the first of them. Where the cache cannot be written, a warning says so
    and the arrays lie in a temporary file.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, key]).encode()).hexdigest()[:20]
    root = cache_folder()
    entry = root / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}-{digest}"
    stored = _load(entry)
    if stored is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with hold(root / f".{digest}.lock", wait=True) as held:
                try:
                    stored = _load(entry) or _fill(root, entry, build)
                finally:
                    Path(held.name).unlink(missing_ok=True)
        except (OSError, _NoRoom) as error:
            warnings.warn(f"cannot write the cache {root} ({error}): the images are decoded again at the next start; "
                          "name a writable folder in FEWLABEL_CACHE", stacklevel=2)
            stored = _without_cache(build)
        else:
            with suppress(OSError):  # another process may be removing the same
                _shrink(root)
    for note in stored.notes:
        warnings.warn(note, stacklevel=2)
    return stored


def _fill(root: Path, entry: Path, build: Build) -> Stored:
    folder = Path(tempfile.mkdtemp(prefix=".part-", dir=root))
    try:
        _write(folder, build)
        shutil.rmtree(entry, ignore_errors=True)  # a damaged former one
        os.rename(folder, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    stored = _load(entry)
    if stored is None:
        raise _NoRoom("what was written cannot be read back")
    return stored


def _without_cache(build: Build) -> Stored:
    try:
        with tempfile.TemporaryDirectory(prefix="fewlabel-") as folder:
            _write(Path(folder), build)
            return _load(Path(folder))  # the mapped files outlive their names
    except _NoRoom as error:
        raise UserError(f"no room for the decoded images ({error}): free space or name a folder in TMPDIR") from None


def _write(folder: Path, build: Build) -> None:
    """Let `build` fill the folder; problems of the folder itself raise _NoRoom."""

    def allocate(shape: tuple[int, ...]) -> np.ndarray:
        try:
            images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a bus error later
                with open(folder / "images.npy", "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot reserve space
                raise _NoRoom(error.strerror) from None
        return images

    try:
        stored = build(allocate)
    except OSError as error:
        raise UserError(f"cannot read the images: {error}") from None
    try:
        stored.images.flush()
        np.save(folder / "labels.npy", stored.labels)
        if stored.vectors is not None:
            np.save(folder / "vectors.npy", stored.vectors)
        (folder / "meta.json").write_text(json.dumps({"classes": stored.classes, "notes": stored.notes}))
    except OSError as error:
        raise _NoRoom(error.strerror) from None


def _load(entry: Path) -> Stored | None:
    """Return the entry, or None if it is absent or damaged."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        # Copy-on-write: writable for PyTorch, which warns otherwise, while the file stays as it is.
        images = np.load(entry / "images.npy", mmap_mode="c")
        labels = np.load(entry / "labels.npy")
        vectors = np.load(entry / "vectors.npy") if (entry / "vectors.npy").exists() else None
    except (OSError, ValueError, EOFError):
        return None
    with suppress(OSError):  # a cache shared read-only
        os.utime(entry)
    return Stored(images, labels, tuple(meta["classes"]), vectors, tuple(meta["notes"]))


def _shrink(root: Path) -> None:
    """Remove the entries that were not used for longest until the rest fits, and what killed processes left."""
    given = os.environ.get("FEWLABEL_CACHE_GB") or str(DEFAULT_GB)
    try:
        limit = float(given) * 1e9
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
