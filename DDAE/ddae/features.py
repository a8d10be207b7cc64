"""Features of augmented copies of a training set, computed once and kept in memory-mapped files."""
from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from DDAE.ddae.data import TrainBatches, item_noise
from DDAE.ddae.probe import Encoder, Examples
from shared import distributed
from shared.augment.views import draw_weak, shift_whole
from shared.data.cache import fill_arrays, rank_part
from shared.training.precision import to_device
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
        features = {key: to_device(array[items], device) for key, array in stored.items()}
        labels = batches.pool.labels[to_device(items, device)]
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
    fill_arrays(paths, shapes, partial(map, make), encoder.probe.batch_size, batches.world,
                f"features, copy {copy}, level {level}")
