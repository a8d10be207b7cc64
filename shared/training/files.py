"""Files that are complete or absent: written under a temporary name, flushed, renamed; and folders held by a lock."""
from __future__ import annotations

import csv
import errno
import glob
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.cli import UserError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; two runs in one folder then go unnoticed
    fcntl = None

LOCK = ".lock"  # in the folder it stands for
NO_SUCH_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_locks: weakref.WeakSet[IO[str]] = weakref.WeakSet()  # of this process


@contextmanager
def atomic(path: str | os.PathLike, mode: str = "wb", previous: str | os.PathLike | None = None) -> Iterator[IO]:
    """Yield a file that becomes `path` when the block ends without an error, and vanishes otherwise.

    `previous`: where the former `path`, if any, is kept. A process killed at any moment leaves the old file, the new
    one, or (between the two renames) `previous` alone; never a part of a file under the final name. UserError for a
    path that no file can have; OSError, with the path in it, for a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with _open_claimed(temporary, mode, encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # what PyTorch's writer failed of
        elif not isinstance(error, OSError):
            raise
        if error.errno in NO_SUCH_PLACE and error.filename == str(temporary):
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
        error.filename = error.filename or str(path)  # a failed write does not say of what
        raise error from None
    if os.name != "nt":  # make the renames last through a power cut; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 1, sort_keys: bool = False) -> None:
    with atomic(path, "w") as file:
        json.dump(content, file, indent=indent, sort_keys=sort_keys)


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic(path, "w") as file:
        file.write(text)


def write_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write an .npy file."""
    with atomic(path) as file:
        np.save(file, array)


def write_csv(path: str | os.PathLike, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic(path, "w") as file:
        csv.writer(file, lineterminator="\n").writerows(chain([head], rows))


def check_writable(path: str | os.PathLike, flag: str, is_folder: bool = False) -> None:
    """Raise UserError, naming `flag`, for a file, or a folder, that cannot be written; before the work for it is done.

    Folders that are missing above it do not matter: `make_dir` makes them.
    """
    path = Path(path)
    if path.is_dir() and not is_folder:
        raise UserError(f"{flag}: {path} is a folder; give the name of a file")
    folder = path.absolute() if is_folder else path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    trial = folder / f".{path.name[:100]}.{os.getpid()}.tmp"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"{flag}: cannot write {path}: {error.strerror}; choose another place") from None


def _open_claimed(path: Path, mode: str, encoding: str | None) -> IO:
    """Open a file for writing and lock it, as a sign for `sweep` that its writer lives."""
    while True:
        file = open(path, mode, encoding=encoding)
        claim(file.fileno())
        if path.exists():
            return file
        file.close()  # swept before it was locked


def claim(descriptor: int, wait: bool = True) -> bool:
    """Lock an open file or folder, and return whether that was possible; waits for another process if `wait`."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another one, or a file system without locks
        return False
    return fcntl is not None


def sweep(folder: str | os.PathLike, pattern: str = "*", below: bool = False) -> None:
    """Remove leftovers of killed writers in a folder, or `below` it; files of a living one stay.

    That is: temporary files of `atomic`, and folders named `.NAME.part-*`, whose final names match `pattern`.
    """
    place = f"{glob.escape(os.fspath(folder))}/{'**/' if below else ''}"
    for ending in (".[0-9]*.tmp", ".part-*"):
        for left in glob.iglob(f"{place}.{pattern}{ending}", recursive=below, include_hidden=True):
            with suppress(OSError):
                descriptor = os.open(left, os.O_RDONLY)
                try:
                    if claim(descriptor, wait=False) and os.path.samestat(os.fstat(descriptor), os.stat(left)):
                        shutil.rmtree(left) if os.path.isdir(left) else os.unlink(left)
                finally:
                    os.close(descriptor)


def cache_folder() -> Path:
    """Return the folder of recomputable files: $FEWLABEL_CACHE, by default ~/.cache/fewlabel."""
    return Path(os.environ.get("FEWLABEL_CACHE") or os.path.expanduser("~/.cache/fewlabel"))


def make_dir(path: str | os.PathLike) -> Path:
    """Make the folder with its parents and return it; UserError if that fails or it cannot be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}; choose another place") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the folder {folder}; choose another one, or change its permissions")
    return folder


def move_aside(folder: str | os.PathLike) -> Path:
    """Rename a folder to `<name>.replaced-1`, or the first further number that is free, and return the new path."""
    folder = Path(folder)
    aside = next(path for number in count(1) if not (path := folder.with_name(f"{folder.name}.replaced-{number}"
                                                                              )).exists())
    os.replace(folder, aside)
    return aside


class InUse(UserError):
    """A folder in which another process works."""


def hold(path: str | os.PathLike, wait: bool = False) -> IO[str]:
    """Return the open lock file: held until it is closed, here and in programs that inherit its descriptor.

    While it is held already, wait, or raise BlockingIOError.
    """
    while True:
        file = open(path, "a")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            file.close()
            raise
        if _is_at(file, path):
            return file
        file.close()  # another process removed or moved it since it was opened


def _is_at(file: IO[str], path: str | os.PathLike) -> bool:
    try:
        return not file.closed and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def lock(folder: str | os.PathLike, wait: bool = False, name: str = LOCK) -> IO[str]:
    """Return the lock of a folder, which is made if need be, as an open file: locked until it is closed or collected.

    While another process holds it, wait, or raise InUse. This process may take it several times.
    """
    path = make_dir(folder) / name
    own = next((file for file in list(_locks) if _is_at(file, path)), None)
    try:
        file = hold(path, wait) if own is None else os.fdopen(os.dup(own.fileno()), "a")
    except BlockingIOError:
        raise InUse(f"{folder} is in use by a run that is still going on; wait for it, or choose another output folder"
                    ) from None
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; choose another output folder") from None
    _locks.add(file)
    return file


@contextmanager
def taken(folder: str | os.PathLike) -> Iterator[None]:
    """Lock a folder while it gets files; afterwards remove the lock, and the folder if it is new and empty."""
    folder = Path(folder)
    is_new, file = not folder.exists(), lock(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _unlock_in_child() -> None:
    """Close the locks of the parent in a forked process, which may outlive it."""
    for file in list(_locks):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def in_use(folder: str | os.PathLike, name: str = LOCK) -> bool:
    """Return whether a process, this one included, holds the lock of the folder."""
    path = Path(folder) / name
    try:
        if path.exists():
            hold(path).close()
    except BlockingIOError:
        return True
    return False


def walk_folders(folder: str | os.PathLike, onerror: Callable[[OSError], None] | None = None
                 ) -> Iterator[tuple[str, list[str], list[str]]]:
    """Do as os.walk from the top; links are followed, but not back up to a folder that they lie in."""
    above = {os.fspath(folder): (_identity(folder),)}
    for root, below, names in os.walk(folder, onerror=onerror, followlinks=True):
        here = above.pop(root)
        known = {name: _identity(os.path.join(root, name)) for name in below}
        below[:] = [name for name in below if known[name] not in here]
        above.update({os.path.join(root, name): (*here, known[name]) for name in below})
        yield root, below, names


def _identity(folder: str | os.PathLike) -> tuple[int, int] | None:
    try:
        state = os.stat(folder)
    except OSError:
        return None
    return state.st_dev, state.st_ino
