"""The images and views of an iteration: a function of (seed, iteration), on any number of ranks."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from DASO.lib.data.augment import Look
from DASO.lib.data.sets import TrainingData
from DASO.lib.losses import class_weights
from shared.data.images import ImageSet
from shared.data.pool import Pool
from shared.distributed import World
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng, torch_rng


@dataclass
class Batch:
    """One rank's part of an iteration's batch, on its device.

    labelled: float32 [B_l, C, H, W], normalised; labels: int64 [B_l]. views: float32 [B_u, C, H, W] each, of the same
    unlabelled images, in the order of `Algorithm.views`. index: int64 [B_u], positions in the unlabelled set. truth:
    int64 [B_u], true labels or -1, for statistics only.
    """

    labelled: Tensor
    labels: Tensor
    views: tuple[Tensor, ...] = ()
    index: Tensor | None = None
    truth: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """The labelled images and all views, for one forward pass with common batch statistics."""
        return torch.cat([self.labelled, *self.views])

    @property
    def sizes(self) -> list[int]:
        """How many of `images` are labelled, and how many of each view."""
        return [len(self.labelled), *map(len, self.views)]


class ViewedPool(Pool):
    """Images and how they are seen."""

    def __init__(self, images: ImageSet, look: Look, device: torch.device) -> None:
        super().__init__(images, look.mean, look.std, device)
        self.look, self.size = look, images.size

    def evaluation_batches(self, indices: np.ndarray, size: int) -> Iterator[Tensor]:
        """Yield the images at `indices` as an evaluation sees them, float32 [n, C, side, side], `size` at a time."""
        for start in range(0, len(indices), size):
            yield self.look.view(self.take(indices[start:start + size]), "eval", None, None)


class Batches:
    """Makes the batch of any iteration, and knows the labelled set, which self-training extends.

    size, ratio: labelled images in the global batch, and unlabelled ones for each of them. views, labelled_view: see
    Algorithm. beta: of class-aware sampling; None: every image as often. counts: images of every class in the present
    labelled set, int64 [K]. drawn_fractions: of the classes in what is drawn [K].
    """

    def __init__(self, data: TrainingData, world: World, seed: int, size: int, ratio: int, views: tuple[str, ...],
                 labelled_view: str, beta: float | None = None) -> None:
        self.world, self.seed, self.views, self.labelled_view = world, seed, views, labelled_view
        self.size, self.unlabelled_size = size, size * ratio
        self.beta, self.num_classes = beta, data.num_classes
        self.labelled = ViewedPool(data.labelled, data.look, world.device)
        self.unlabelled = ViewedPool(data.unlabelled, data.look, world.device) if data.unlabelled is not None else None
        if self.unlabelled is not None and views:
            self.unlabelled_sampler = Sampler(len(self.unlabelled), self.unlabelled_size, seed, "unlabelled")
        self.extend(np.array([], np.int64), np.array([], np.int64))

    def extend(self, index: np.ndarray, labels: np.ndarray) -> None:
        """Let the labelled set be the initial one and the unlabelled images at `index` with these labels, int64 [n]."""
        self.extra_index, self.extra_labels = index, labels
        self.labels = torch.cat([self.labelled.labels, to_device(labels, self.world.device)])
        weights, every = None, self.labels.cpu().numpy()
        self.counts = np.bincount(every, minlength=self.num_classes)
        if self.beta is not None:
            weights, self.drawn_fractions = sampling_weights(every, self.num_classes, self.beta)
        self.sampler = Sampler(len(every), self.size, self.seed, f"labelled {len(index)}", weights)

    def __call__(self, it: int) -> Batch:
        """Return the batch of iteration `it`."""
        chosen = self.sampler(it)[self.world.slice(self.size)]
        labelled = self._view(self._take_labelled(chosen), self.labelled, self.labelled_view, it, "labelled", self.size)
        labels = self.labels[to_device(chosen, self.world.device)]
        if not self.views:
            return Batch(labelled, labels)
        drawn = self.unlabelled_sampler(it)[self.world.slice(self.unlabelled_size)]
        images, index = self.unlabelled.take(drawn), to_device(drawn, self.world.device)
        views = tuple(self._view(images, self.unlabelled, kind, it, f"view {number}", self.unlabelled_size)
                      for number, kind in enumerate(self.views))
        return Batch(labelled, labels, views, index, self.unlabelled.labels[index])

    def _take_labelled(self, chosen: np.ndarray) -> Tensor:
        """Return images of the labelled set, uint8 [n, C, H, W]; positions after the initial ones are additions."""
        added = chosen >= len(self.labelled)
        images = self.labelled.take(np.where(added, 0, chosen))
        if added.any():
            places = to_device(np.flatnonzero(added), self.world.device)
            images[places] = self.unlabelled.take(self.extra_index[chosen[added] - len(self.labelled)])
        return images

    def _view(self, images: Tensor, pool: ViewedPool, kind: str, it: int, purpose: str, count: int) -> Tensor:
        """Return a view of this rank's part of `count` images."""
        draws = pool.look.draw(kind, count, numpy_rng(self.seed, it, purpose), pool.size)
        part = self.world.slice(count)
        return pool.look.view(images, kind, *(None if drawn is None else drawn[part] for drawn in draws))

    def state_dict(self) -> dict[str, Any]:
        return {"extra_index": torch.from_numpy(self.extra_index), "extra_labels": torch.from_numpy(self.extra_labels)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.extend(state["extra_index"].numpy(), state["extra_labels"].numpy())


class Sampler:
    """The positions of any iteration's batch, as a function of (seed, iteration): int64 [batch].

    One pass over the data follows another without a gap, so a batch may end one pass and begin the next. A pass depends
    on the seed and its own number alone: nothing is stored, and a run continues anywhere.
    """

    def __init__(self, count: int, batch: int, seed: int, purpose: str, weights: np.ndarray | None = None) -> None:
        self.count, self.batch, self.seed, self.purpose, self.weights = count, batch, seed, purpose, weights
        self._known: dict[int, np.ndarray] = {}

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._known:
            self._known = {known: value for known, value in self._known.items() if known >= number - 1}
            self._known[number] = draw_pass(self.count, self.weights, torch_rng(self.seed, number, self.purpose))
        return self._known[number]

    def __call__(self, it: int) -> np.ndarray:
        start = it * self.batch
        parts, wanted = [], self.batch
        while wanted:
            number, offset = divmod(start, self.count)
            parts.append(self._pass(number)[offset:offset + wanted])
            wanted -= len(parts[-1])
            start += len(parts[-1])
        return np.concatenate(parts)


def draw_pass(count: int, weights: np.ndarray | None = None, generator: torch.Generator | None = None) -> np.ndarray:
    """Return `count` positions int64: a permutation, or drawn with replacement in proportion to `weights` [count]."""
    if weights is None:
        return torch.randperm(count, generator=generator).numpy()
    return torch.multinomial(torch.from_numpy(weights), count, replacement=True, generator=generator).numpy()


def sampling_weights(labels: np.ndarray, num_classes: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (weight of every image float32 [N], fraction of every class in what is drawn [K]).

    A class's images weigh the inverse of their effective number, (1 - beta) / (1 - beta^n); of n for beta = 1.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = class_weights(counts.tolist(), beta).numpy()
    drawn = weights * counts
    return weights[labels], drawn / drawn.sum()
