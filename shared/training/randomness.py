"""Randomness without state: every draw is a function of (seed, step, purpose), or of the seed of one image.

A step draws for the whole global batch and each rank takes its part, so the numbers depend neither on the number of
ranks nor on restarts, and no generator state has to be saved.
"""
from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from shared.cpu.kernels import is_channels_last
from shared.training.precision import to_device

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


# ------------------------------------------------------------------------------------------------------------ dropout

MIXERS = (0x85EBCA6B, 0xC2B2AE35)  # of the finaliser of MurmurHash3


class Dropout(torch.nn.Module):
    """Zero the fraction `p` of the elements of x [N, ...] in training mode, and divide the rest by 1 - p if `rescale`.

    After `set_dropout_keys` the mask follows from its keys; before, it comes from torch's own generator. `shape` at the
    call: the mask is drawn for that shape and broadcast.
    """

    def __init__(self, p: float, rescale: bool = True) -> None:
        super().__init__()
        self.p, self.rescale = p, rescale
        self.keys: torch.Tensor | None = None  # int32 [2, N]: an odd factor and an offset per sample

    def forward(self, x: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return x * 0
        if self.keys is None and shape is None and self.rescale:
            return F.dropout(x, self.p)
        shape = tuple(x.shape if shape is None else shape)
        if self.keys is None:
            keep = torch.rand(shape, device=x.device) >= self.p
        else:
            keep = self._keep(x, shape)
        mask = keep.to(x.dtype)
        return x * (mask.mul_(1 / (1 - self.p)) if self.rescale else mask)

    @torch.no_grad()
    def _keep(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        factor, offset = self.keys.view(2, shape[0], *[1] * (len(shape) - 1))
        positions = _hash if torch.compiler.is_compiling() else _cached_hash
        # Multiply-add hashing: the high bits of an odd multiple of a well-mixed number are uniform, and for two
        # samples with their own factors they are independent.
        mixed = (positions(shape[1:], is_channels_last(x), x.device) * factor).add_(offset)
        return mixed.ge_(round(self.p * 2**32) - 2**31)  # in place: 0 and 1 as int32, which costs less than booleans


def set_dropout_keys(net: torch.nn.Module, seed: int, step: int, sample_indices: Sequence[int]) -> None:
    """Choose the masks of the next forward of `net` in all its Dropout layers.

    `sample_indices` [N]: position of each image of that forward in the global batch of `step`.
    """
    layers = [module for module in net.modules() if isinstance(module, Dropout)]
    base = numpy_rng(seed, step, "dropout").integers(2**64, dtype=np.uint64)
    counter = np.arange(len(layers), dtype=np.uint64)[:, None] << np.uint64(32)
    number = _mix64(_mix64(base + counter) + np.asarray(sample_indices, np.uint64))  # [layers, N], 64 random bits
    number = number | np.uint64(1)
    halves = np.stack([number, number >> np.uint64(32)], axis=1).astype(np.uint32).view(np.int32)
    for layer, keys in zip(layers, to_device(halves, next(net.parameters()).device), strict=True):
        layer.keys = keys


@contextlib.contextmanager
def derived_dropout_keys(net: torch.nn.Module, rows: torch.Tensor, tags: torch.Tensor) -> Iterator[None]:
    """Give the forwards of `net` in this context their own masks; then restore the former ones.

    rows, tags: int64 [M] on the network's device. The mask of input i is a function of the former keys of input rows[i]
    and of tags[i] >= 0. Layers without keys are left alone.
    """
    layers = [module for module in net.modules() if isinstance(module, Dropout) and module.keys is not None]
    before = [layer.keys for layer in layers]
    if layers:
        number = (torch.stack(before)[:, :, rows].to(torch.int64) + (tags + 1) * 0x9E3779B9) & 0xFFFFFFFF
        number = _mix32(number)
        number[:, 0] |= 1
        for layer, keys in zip(layers, number, strict=True):
            layer.keys = keys
    try:
        yield
    finally:
        for layer, keys in zip(layers, before, strict=True):
            layer.keys = keys


def _mix64(number: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers whose every output bit depends on every input bit (SplitMix64, Steele et al.)."""
    with np.errstate(over="ignore"):
        number = number + np.uint64(0x9E3779B97F4A7C15)
        number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return number ^ (number >> np.uint64(31))


def _hash(shape: tuple[int, ...], channels_last: bool, device: torch.device) -> torch.Tensor:
    """Return well-mixed int32 numbers [1, *shape], all different: a function of the element's position alone."""
    number = _mix32(torch.arange(math.prod(shape), dtype=torch.int64, device=device)).view(1, *shape)
    return number.contiguous(memory_format=torch.channels_last) if channels_last else number


_cached_hash = lru_cache(maxsize=64)(_hash)


def _mix32(number: torch.Tensor) -> torch.Tensor:
    for factor in MIXERS:
        number = ((number ^ (number >> 15)) * factor) & 0xFFFFFFFF
    return (number ^ (number >> 16)).to(torch.int32)
