"""Features of augmented copies of a training set, computed once and kept in memory-mapped files."""
from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from DDAE.ddae.batches import TrainBatches, item_noise, share_out
from DDAE.ddae.encoder import Encoder
from DDAE.ddae.partial import PartialArray
from shared import distributed
from shared.augment.views import draw_weak, shift_whole
from shared.distributed import World
from shared.training.progress import Progress
from shared.training.randomness import numpy_rng


class FeatureFiles:
    """{save_dir}/features/<encoder>-<digest>/<copy>_<level>_<block>.npy, float32 [N, width] each.

    The digest stands for what the features depend on besides: weights, data set, augmentation, seed, precision. An
    image's view and noise depend on (seed, item, copy, level) alone. What is there is not computed again.
    """

    def __init__(self, encoder: Encoder, options: argparse.Namespace, world: World) -> None:
        self.encoder, self.copies, self.seed, self.world = encoder, options.copies, options.seed, world
        probe, config = encoder.probe, encoder.config
        about = [encoder.facts(), config.dataset, options.data_dir, dict(config.network), probe.flip, probe.pad,
                 options.seed, encoder.precision, world.device.type]
        digest = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:12]
        self.folder = Path(encoder.config.save_dir) / "features" / f"{encoder.name}-{digest}"

    def examples(self, batches: TrainBatches, levels: Sequence[int], names: Sequence[str]) -> StoredExamples:
        """Return the features by training step, having computed what is missing."""
        for copy in range(self.copies):
            for level in levels:
                absent = [name for name in names if not self.path(copy, level, name).exists()]
                distributed.barrier(self.world)  # all have looked before one makes them
                if absent:
                    self.compute(batches, copy, level, absent)
        arrays = [{f"{level}/{name}": np.load(self.path(copy, level, name), mmap_mode="r") for level in levels
                   for name in names} for copy in range(self.copies)]
        return StoredExamples(batches, arrays)

    def path(self, copy: int, level: int, name: str) -> Path:
        return self.folder / f"{copy}_{level}_{name}.npy"

    def compute(self, batches: TrainBatches, copy: int, level: int, names: Sequence[str]) -> None:
        """Fill the files of some blocks at one level in one pass over the images."""
        files = {name: PartialArray(self.path(copy, level, name)) for name in names}
        if self.world.main:
            for name, file in files.items():
                file.create((batches.count, self.encoder.widths[name]))
        distributed.barrier(self.world)
        part, chunk = share_out(batches.count, self.world), self.encoder.probe.batch_size
        items = np.unique(np.concatenate([file.missing(part) for file in files.values()]))
        arrays = {name: file.open() for name, file in files.items()}
        draws = draw_weak(batches.count, numpy_rng(self.seed, copy, "augment copy"), batches.shape, batches.policy)
        bar = Progress(f"features, copy {copy}, level {level}", len(items), "images", shown=self.world.main)
        for start in range(0, len(items), chunk):
            chosen = items[start:start + chunk]
            images = shift_whole(batches.pool.take(chosen), draws[chosen]).float().div_(255)
            noise = item_noise(self.seed, chosen, images.shape[1:], f"copy {copy} noise {level}").to(images.device)
            for name, value in self.encoder.features(images, level, noise, names).items():
                arrays[name][chosen] = value.cpu().numpy()
            bar.advance(len(chosen))
        bar.close()
        for array in arrays.values():
            array.flush()
        distributed.barrier(self.world)
        if self.world.main:
            for file in files.values():
                file.finish()
        distributed.barrier(self.world)


class StoredExamples:
    """The features of a step from one of the copies, which take turns epoch by epoch."""

    def __init__(self, batches: TrainBatches, arrays: list[dict[str, np.ndarray]]) -> None:
        self.batches, self.arrays = batches, arrays

    def __call__(self, step: int) -> tuple[dict[str, Tensor], Tensor, float]:
        everything = self.batches.items(step)
        items = everything[share_out(len(everything), self.batches.world)]
        device, copy = self.batches.pool.device, self.arrays[step // self.batches.per_epoch % len(self.arrays)]
        features = {key: torch.from_numpy(array[items]).to(device) for key, array in copy.items()}
        labels = self.batches.pool.labels[torch.from_numpy(items).to(device)]
        return features, labels, len(items) / len(everything)
