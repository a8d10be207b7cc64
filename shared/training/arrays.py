"""Large arrays that several ranks fill row by row: memory-mapped, and continued where a killed run has left them."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from shared import distributed
from shared.distributed import World
from shared.training.files import atomic, make_dir
from shared.training.progress import Progress

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
    """Make an array of NaN, unless there is one of this shape."""
    make_dir(path.parent)
    try:
        found = np.load(path, mmap_mode="r")
        if found.shape == shape and found.dtype == dtype:
            return
    except (ValueError, EOFError, OSError):
        pass  # none yet, or cut short
    with atomic(path) as file:
        np.save(file, np.broadcast_to(dtype("nan"), shape))
