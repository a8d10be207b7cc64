"""Files that are complete or absent: written under a temporary name, flushed, renamed; and folders held by a lock."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shared.cli import UserError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; two runs in one folder then go unnoticed
    fcntl = None

LOCK = ".lock"  # in the folder it stands for


@contextmanager
def atomic(path: str | os.PathLike, mode: str = "wb", previous: str | os.PathLike | None = None) -> Iterator[IO]:
    """Yield a file that becomes `path` when the block ends without an error, and vanishes otherwise.

    `previous`: where the former `path`, if there is one, is kept. A process killed at any moment leaves the old file,
    the new one, or (between the two renames) `previous` alone; never a part of a file under the final name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a failed write does not say of what
            error.filename = error.filename or str(path)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the renames last through a power cut, where the system can (Windows cannot open a folder)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_dir(path: str | os.PathLike) -> Path:
    """Create the folder with its parents and return it; raise UserError when it cannot be created or written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}; choose another place") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the folder {folder}; choose another one, or change its permissions")
    return folder


class InUse(UserError):
    """A folder in which another process works."""


def hold(path: str | os.PathLike, wait: bool = False) -> IO[str]:
    """Return the open lock file: held until it is closed, here and in the children that inherit it.

    While another process holds it, wait, or raise BlockingIOError.
    """
    file = open(path, "a")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file


def lock(folder: str | os.PathLike, wait: bool = False, name: str = LOCK) -> IO[str]:
    """Return the lock of a folder, which is made if need be; while another process holds it, wait, or raise InUse."""
    try:
        return hold(make_dir(folder) / name, wait)
    except BlockingIOError:
        raise InUse(f"{folder} is in use by a run that is still going on; wait for it, or choose another "
                    "output folder") from None


def in_use(folder: str | os.PathLike, name: str = LOCK) -> bool:
    """Return whether a process holds the lock of the folder."""
    path = Path(folder) / name
    try:
        if path.exists():
            hold(path).close()
    except BlockingIOError:
        return True
    return False
