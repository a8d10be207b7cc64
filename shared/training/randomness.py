"""Randomness without state: every draw is a function of (seed, step, purpose), or of the seed of one image.

A step draws for the whole global batch and each rank takes its part, so the numbers depend neither on the number of
ranks nor on restarts, and no generator state has to be saved.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

Item = TypeVar("Item")


def numpy_rng(seed: int, step: int, purpose: str) -> np.random.Generator:
    """Return the host generator of this (seed, step, purpose), for indices and augmentation parameters.

    Counter-based (Philox, 128-bit key): neighbouring steps are independent, and the numbers are the same on every
    machine.
    """
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(seed, step, purpose), np.uint64)))


def torch_rng(seed: int, step: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the generator of this (seed, step, purpose) on `device`, for large draws such as noise.

    CPU and CUDA generators give different numbers for the same seed.
    """
    number = int.from_bytes(_digest(seed, step, purpose)[:8], "little") >> 1
    return torch.Generator(device=device).manual_seed(number)


def _digest(seed: int, step: int, purpose: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=16).digest()


def split_batches(items: Sequence[Item], max_batch: int, ranks: int) -> list[list[Item]]:
    """Cut `items` into consecutive parts of at most `max_batch`; rank r takes parts r, r + ranks, ...

    The number of parts is a multiple of `ranks`, so that all have as many to do. Sizes differ by one at most, larger
    parts first; with fewer items than ranks the last parts are empty.
    """
    count = ((len(items) - 1) // (max_batch * ranks) + 1) * ranks
    size, larger = divmod(len(items), count) if count else (0, 0)
    starts = [i * size + min(i, larger) for i in range(count + 1)]
    return [list(items[start:end]) for start, end in zip(starts, starts[1:], strict=False)]


class SeedGenerators:
    """Draws for a batch of images, row i from the generator of seeds[i] (modulo 2^32), on `device`.

    The published order of draws per seed is the latent, the class of a conditional model, then the noises of stochastic
    steps. CPU and CUDA generators give different numbers for the same seed; published images are CUDA's.
    """

    def __init__(self, seeds: Sequence[int], device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(seed % (1 << 32)) for seed in seeds]

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Draw unit Gaussian noise [len(seeds), *shape]."""
        return torch.stack([torch.randn(*shape, generator=g, device=self.device, dtype=dtype) for g in self.generators])

    def integers(self, high: int) -> torch.Tensor:
        """Draw int64 [len(seeds)] in 0..high-1."""
        return torch.stack([torch.randint(high, (), generator=g, device=self.device) for g in self.generators])
