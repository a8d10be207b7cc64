"""Dropout as a function of the training step.

The mask of a layer is an integer hash of (seed, step, layer, global sample index, element). It depends neither on the
state of a random number generator nor on how ranks or accumulation rounds share a batch.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from shared.cpu.kernels import is_channels_last
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng

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
