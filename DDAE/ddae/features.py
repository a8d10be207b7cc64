"""Features of augmented copies of a training set, computed once and kept in memory-mapped files."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from DDAE.ddae.data import TrainBatches, item_noise, rank_part
from DDAE.ddae.probe import Encoder
from shared import distributed
from shared.augment.views import draw_weak, shift_whole
from shared.distributed import World
from shared.training.files import atomic, make_dir
from shared.training.precision import to_device
from shared.training.progress import Progress
from shared.training.randomness import numpy_rng


class FeatureFiles:
    """{save_dir}/features/<encoder>-<digest>/<copy>_<level>_<block>.npy, float32 [N, width] each.

    The digest stands for all that the features depend on: the content of images, labels and weights, and the settings.
    An image's view and noise depend on (seed, item, copy, level) alone. Files that are there are not computed again.
    """

    def __init__(self, encoder: Encoder, batches: TrainBatches, copies: int, images: str) -> None:
        self.encoder, self.batches, self.copies = encoder, batches, copies
        config, probe = encoder.config, encoder.probe
        identity = [images, encoder.weights, config.model_type, config.diffusion, config.network, probe.flip, probe.pad,
                    batches.seed, encoder.precision, batches.world.device.type]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        self.folder = Path(config.save_dir) / "features" / f"{encoder.name}-{digest}"

    def examples(self, levels: Sequence[int], names: Sequence[str]) -> StoredExamples:
        """Return the features by training step, having computed what is missing."""
        for copy in range(self.copies):
            for level in levels:
                absent = [name for name in names if not self.path(copy, level, name).exists()]
                distributed.barrier(self.batches.world)  # all have looked before one makes them
                if absent:
                    self.compute(copy, level, absent)
        arrays = [{f"{level}/{name}": np.load(self.path(copy, level, name), mmap_mode="r") for level in levels
                   for name in names} for copy in range(self.copies)]
        return StoredExamples(self.batches, arrays)

    def path(self, copy: int, level: int, name: str) -> Path:
        return self.folder / f"{copy}_{level}_{name}.npy"

    def compute(self, copy: int, level: int, names: Sequence[str]) -> None:
        """Fill the files of some blocks at one level in one pass over the images."""
        batches, encoder = self.batches, self.encoder
        draws = draw_weak(batches.count, numpy_rng(batches.seed, copy, "augment copy"), batches.shape, batches.policy)

        def make(items: np.ndarray) -> dict[str, np.ndarray]:
            images = shift_whole(batches.pool.take(items), draws[items]).float().div_(255)
            noise = item_noise(batches.seed, items, images.shape[1:], f"copy {copy} noise {level}").to(images.device)
            return {name: value.cpu().numpy() for name, value in encoder.features(images, level, noise, names).items()}

        fill_arrays({name: self.path(copy, level, name) for name in names},
                    {name: (batches.count, encoder.widths[name]) for name in names}, make, encoder.probe.batch_size,
                    batches.world, f"features, copy {copy}, level {level}")


class StoredExamples:
    """The features of a step from one of the copies, which take turns epoch by epoch."""

    def __init__(self, batches: TrainBatches, arrays: list[dict[str, np.ndarray]]) -> None:
        self.batches, self.arrays = batches, arrays

    def __call__(self, step: int) -> tuple[dict[str, Tensor], Tensor, float]:
        everything = self.batches.items(step)
        items = everything[rank_part(len(everything), self.batches.world)]
        device, copy = self.batches.pool.device, self.arrays[step // self.batches.per_epoch % len(self.arrays)]
        features = {key: to_device(array[items], device) for key, array in copy.items()}
        labels = self.batches.pool.labels[to_device(items, device)]
        return features, labels, len(items) / len(everything)


def fill_arrays(paths: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]],
                make: Callable[[np.ndarray], Mapping[str, np.ndarray]], batch: int, world: World, desc: str) -> None:
    """Make float32 .npy files of equally many rows, every rank its part of them.

    make: row numbers int64 [n], n <= batch -> name -> rows [n, ...]. A file gets its name when it is complete. Before,
    it is <name>.part.npy, in which missing rows are NaN: a killed run's rows stay, on any number of ranks.
    """
    parts = {name: path.with_name(f"{path.stem}.part.npy") for name, path in paths.items()}
    if world.main:
        for name, path in parts.items():
            _create(path, shapes[name])
    distributed.barrier(world)
    arrays = {name: np.lib.format.open_memmap(path, "r+") for name, path in parts.items()}
    own = rank_part(next(iter(shapes.values()))[0], world)
    # A sum is NaN if any number of its row is.
    missing = [np.isnan(array[own].reshape(own.stop - own.start, -1).sum(1)) for array in arrays.values()]
    items = own.start + np.flatnonzero(np.any(missing, axis=0))
    bar = Progress(desc, len(items), "images", shown=world.main)
    for start in range(0, len(items), batch):
        rows = items[start:start + batch]
        for name, values in make(rows).items():
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


def _create(path: Path, shape: tuple[int, ...]) -> None:
    """Make an array of NaN, unless there is one of this shape."""
    make_dir(path.parent)
    try:
        if np.load(path, mmap_mode="r").shape == shape:
            return
    except (ValueError, EOFError, OSError):
        pass  # none yet, or cut short
    with atomic(path) as file:
        np.save(file, np.broadcast_to(np.float32("nan"), shape))
