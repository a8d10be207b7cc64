"""The batch of an iteration: which images, which views. A function of (seed, iteration), on any number of ranks."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from DASO.lib.data.augment import Look
from DASO.lib.data.samplers import Sampler, sampling_weights
from DASO.lib.data.sets import TrainingData
from shared.augment.randaugment import to_device
from shared.data.images import ImageSet
from shared.data.pool import Pool
from shared.distributed import World
from shared.training.randomness import numpy_rng


@dataclass
class Batch:
    """One rank's part of an iteration's batch, on its device.

    labelled: float32 [B_l, C, H, W], normalised; labels: int64 [B_l]. views: float32 [B_u, C, H, W] each, of the same
    unlabelled images, in the order of `Algorithm.views`. index: int64 [B_u], positions in the unlabelled set. truth:
    int64 [B_u], true labels or -1, for statistics only: no loss may look at it.
    """

    labelled: Tensor
    labels: Tensor
    views: tuple[Tensor, ...] = ()
    index: Tensor | None = None
    truth: Tensor | None = None


class ViewedPool:
    """Images and how they are seen."""

    def __init__(self, images: ImageSet, look: Look, device: torch.device) -> None:
        self.pool, self.look, self.size = Pool(images, look.mean, look.std, device), look, images.size

    def __len__(self) -> int:
        return len(self.pool)

    @property
    def labels(self) -> Tensor:
        """int64 [N] on the device, -1 where unknown."""
        return self.pool.labels

    def evaluation_batches(self, indices: np.ndarray, size: int) -> Iterator[Tensor]:
        """Yield the images at `indices` as an evaluation sees them, float32 [n, C, side, side], `size` at a time."""
        for start in range(0, len(indices), size):
            yield self.look.view(self.pool.take(indices[start:start + size]), "eval", None, None)


class Batches:
    """Makes the batch of any iteration, and knows the labelled set, which self-training extends.

    size, ratio: labelled images in the global batch, and unlabelled ones for each of them. views, labelled_view: see
    Algorithm. counts: images of every class in the labelled set as it now is, int64 [K].
    """

    def __init__(self, data: TrainingData, world: World, seed: int, size: int, ratio: int, views: tuple[str, ...],
                 labelled_view: str, beta: float | None = None) -> None:
        self.world, self.seed, self.size, self.views, self.labelled_view = world, seed, size, views, labelled_view
        self.beta, self.num_classes = beta, data.num_classes
        self.labelled = ViewedPool(data.labelled, data.look, world.device)
        self.unlabelled = ViewedPool(data.unlabelled, data.look, world.device) if data.unlabelled is not None else None
        self.part = world.slice(size)
        self.count = size * ratio
        self.unlabelled_part = world.slice(self.count)
        if self.unlabelled is not None and views:
            self.unlabelled_sampler = Sampler(len(self.unlabelled), self.count, seed, "unlabelled")
        self.extend(np.array([], np.int64), np.array([], np.int64))

    def extend(self, index: np.ndarray, labels: np.ndarray) -> None:
        """Let the labelled set be the initial one and the unlabelled images at `index` with these labels, int64 [n]."""
        self.extra_index, self.extra_labels = np.asarray(index, np.int64), np.asarray(labels, np.int64)
        own = self.labelled.labels
        self.all_labels = torch.cat([own, torch.from_numpy(self.extra_labels).to(own.device)])
        weights, labels = None, self.all_labels.cpu().numpy()
        self.counts = np.bincount(labels, minlength=self.num_classes)
        if self.beta is not None:
            weights, self.drawn_shares = sampling_weights(labels, self.num_classes, self.beta)
        self.sampler = Sampler(len(self.all_labels), self.size, self.seed, f"labelled {len(self.extra_index)}", weights)

    def __call__(self, it: int) -> Batch:
        """Return the batch of iteration `it`."""
        device = self.world.device
        chosen = self.sampler(it)[self.part]
        labelled = self._view(self.take_labelled(chosen), self.labelled, self.labelled_view, it, "labelled", self.size,
                              self.part)
        labels = self.all_labels[to_device(chosen, device)]
        if not self.views:
            return Batch(labelled, labels)
        drawn = self.unlabelled_sampler(it)[self.unlabelled_part]
        images, index = self.unlabelled.pool.take(drawn), to_device(drawn, device)
        views = tuple(self._view(images, self.unlabelled, kind, it, f"view {number}", self.count, self.unlabelled_part)
                      for number, kind in enumerate(self.views))
        return Batch(labelled, labels, views, index, self.unlabelled.labels[index])

    def take_labelled(self, chosen: np.ndarray) -> Tensor:
        """Return images of the labelled set, uint8 [n, C, H, W]; positions behind the initial ones are additions."""
        initial = len(self.labelled)
        if not len(self.extra_index):
            return self.labelled.pool.take(chosen)
        added = chosen >= initial
        images = self.labelled.pool.take(np.where(added, 0, chosen))
        if added.any():
            places = to_device(np.flatnonzero(added), self.world.device)
            images[places] = self.unlabelled.pool.take(self.extra_index[chosen[added] - initial])
        return images

    def _view(self, images: Tensor, pool: ViewedPool, kind: str, it: int, purpose: str, count: int,
              part: slice) -> Tensor:
        draws = pool.look.draw(kind, count, numpy_rng(self.seed, it, purpose), pool.size)
        return pool.look.view(images, kind, *(None if drawn is None else drawn[part] for drawn in draws))

    def state_dict(self) -> dict[str, Any]:
        return {"extra_index": torch.from_numpy(self.extra_index), "extra_labels": torch.from_numpy(self.extra_labels)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.extend(state["extra_index"].numpy(), state["extra_labels"].numpy())
