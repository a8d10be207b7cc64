"""Features of augmented copies of a training set, computed once and kept in memory-mapped files."""
from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from DDAE.ddae.data import TrainBatches, item_noise, rank_part
from DDAE.ddae.probe import Encoder, Examples
from shared import distributed
from shared.augment.views import draw_weak, shift_whole
from shared.distributed import World
from shared.training.files import atomic, make_dir
from shared.training.progress import Progress
from shared.training.randomness import numpy_rng


def stored_examples(encoder: Encoder, batches: TrainBatches, levels: Sequence[int], names: Sequence[str], copies: int,
                    images: str) -> Examples:
    """Return the features by training step, from copies that take turns epoch by epoch; first compute missing ones.

    They lie in {save_dir}/features/<encoder>-<digest>/<copy>_<level>_<block>.npy, float32 [N, width] each. The digest
    stands for all that they depend on: the content of `images` (a fingerprint) and weights, and the settings. An
    image's view and noise depend on (seed, item, copy, level) alone.
    """
    world, config, probe = batches.world, encoder.config, encoder.probe
    identity = [images, encoder.weights, config.model_type, config.diffusion, config.network, probe.flip, probe.pad,
                batches.seed, encoder.precision, world.device.type]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    folder = Path(config.save_dir) / "features" / f"{encoder.name}-{digest}"
    arrays: list[dict[str, np.ndarray]] = [{} for _ in range(copies)]
    for copy, level in itertools.product(range(copies), levels):
        paths = {name: folder / f"{copy}_{level}_{name}.npy" for name in names}
        absent = {name: path for name, path in paths.items() if not path.exists()}
        distributed.barrier(world)  # all have looked before one makes them
        if absent:
            compute(encoder, batches, copy, level, absent)
        arrays[copy] |= {f"{level}/{name}": np.load(path, mmap_mode="r") for name, path in paths.items()}

    def examples(step: int) -> tuple[dict[str, Tensor], Tensor, float]:
        everything = batches.items(step)
        items = everything[rank_part(len(everything), world)]
        device, stored = batches.pool.device, arrays[step // batches.per_epoch % copies]
        features = {key: torch.from_numpy(array[items]).to(device) for key, array in stored.items()}
        labels = batches.pool.labels[torch.from_numpy(items).to(device)]
        return features, labels, len(items) / len(everything)

    return examples


def compute(encoder: Encoder, batches: TrainBatches, copy: int, level: int, paths: Mapping[str, Path]) -> None:
    """Fill the files of some blocks at one level in one pass over the images. paths: by block."""
    draws = draw_weak(batches.count, numpy_rng(batches.seed, copy, "augment copy"), batches.shape, batches.policy)

    def make(items: np.ndarray) -> dict[str, np.ndarray]:
        images = shift_whole(batches.pool.take(items), draws[items]).float().div_(255)
        noise = item_noise(batches.seed, items, images.shape[1:], f"copy {copy} noise {level}").to(images.device)
        found = encoder.features(images, level, noise, list(paths))
        return {name: value.cpu().numpy() for name, value in found.items()}

    shapes = {name: (batches.count, encoder.widths[name]) for name in paths}
    fill_arrays(paths, shapes, make, encoder.probe.batch_size, batches.world, f"features, copy {copy}, level {level}")


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
