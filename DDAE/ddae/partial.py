"""Arrays on disk that several processes fill, and that a killed run goes on filling."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from shared.training.files import atomic, make_dir

ROWS = 1024  # looked at together


class PartialArray:
    """A float32 .npy file while it is being made. What is not written yet is NaN, so any process can go on.

    `path` appears, complete, with `finish`; before, the array lies beside it as `<name>.part.npy`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.stem + ".part.npy")

    def create(self, shape: tuple[int, ...]) -> None:
        """Make the file, or keep what there is if it is of this shape (for one process)."""
        make_dir(self.path.parent)
        if self.part.exists():
            try:
                if np.load(self.part, mmap_mode="r").shape == tuple(shape):
                    return
            except (ValueError, EOFError, OSError):
                pass  # cut short: made anew
        with atomic(self.part) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)})
            rows = np.full((ROWS, *shape[1:]), np.nan, "<f4")
            for start in range(0, shape[0], ROWS):
                file.write(rows[:shape[0] - start].tobytes())

    def open(self) -> np.ndarray:
        """Return the array, writable, mapped into memory."""
        return np.lib.format.open_memmap(self.part, "r+")

    def missing(self, part: slice) -> np.ndarray:
        """Return which of the rows start..stop - 1 are not there, or not there in full: int64 [n]."""
        array = self.open()
        found = []
        for start in range(part.start, part.stop, ROWS):
            rows = array[start:min(start + ROWS, part.stop)]
            found.append(start + np.flatnonzero(np.isnan(rows).reshape(len(rows), -1).any(1)))
        return np.concatenate([*found, np.empty(0, np.int64)]).astype(np.int64)

    def finish(self) -> None:
        """Give the file its name (for one process, after all have flushed)."""
        os.replace(self.part, self.path)
