"""Which images come in which iteration: endless permutations, or draws that favour rare classes."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from DASO.lib.losses import class_weights
from shared.training.randomness import torch_rng


def permutations(count: int, generator: torch.Generator | None = None) -> Iterator[np.ndarray]:
    """Yield permutations of `count` positions, int64 [count], one a pass over the data."""
    while True:
        yield torch.randperm(count, generator=generator).numpy()


def sampling_weights(labels: np.ndarray, num_classes: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (weight of every image float32 [N], share of every class in what is drawn [K]).

    A class's images weigh the inverse of their effective number, (1 - beta) / (1 - beta^n); of n for beta = 1.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = class_weights(counts.tolist(), beta).numpy()
    drawn = weights * counts
    return weights[labels], drawn / drawn.sum()


def weighted_passes(weights: np.ndarray, generator: torch.Generator | None = None) -> Iterator[np.ndarray]:
    """Yield passes of N draws with replacement, int64 [N], each image in proportion to its weight [N]."""
    tensor = torch.as_tensor(weights)
    while True:
        yield torch.multinomial(tensor, len(tensor), replacement=True, generator=generator).numpy()


def take(passes: Iterator[np.ndarray], total: int) -> np.ndarray:
    """Return the first `total` positions of successive passes."""
    parts, count = [], 0
    while count < total:
        parts.append(next(passes))
        count += len(parts[-1])
    return np.concatenate(parts)[:total]


class Sampler:
    """The positions of any iteration's batch, as a function of (seed, iteration): int64 [batch].

    One pass follows another without a gap, so a batch may end one pass and begin the next. A pass depends on the seed
    and its own number alone: nothing is stored, and a run continues anywhere.
    """

    def __init__(self, count: int, batch: int, seed: int, purpose: str, weights: Sequence[float] | None = None) -> None:
        self.count, self.batch, self.seed, self.purpose = count, batch, seed, purpose
        self.weights = None if weights is None else np.asarray(weights, np.float32)
        self._known: dict[int, np.ndarray] = {}

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._known:
            generator = torch_rng(self.seed, number, self.purpose)
            source = permutations(self.count, generator) if self.weights is None else weighted_passes(
                self.weights, generator)
            self._known = {known: value for known, value in self._known.items() if known >= number - 1}
            self._known[number] = next(source)
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
