"""Randomness without state: every draw is a function of (seed, step, purpose).

A step draws for the whole global batch and each rank takes its part, so the numbers depend neither on the number of
ranks nor on when a run was last restarted, and no generator state has to be saved.
"""
from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def _digest(seed: int, step: int, purpose: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=16).digest()


def numpy_rng(seed: int, step: int, purpose: str) -> np.random.Generator:
    """Return the host generator of this (seed, step, purpose), for indices and augmentation parameters.

    Counter-based (Philox, 128-bit key), so that neighbouring steps are independent and the numbers are the same on
    every machine.
    """
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(seed, step, purpose), np.uint64)))


def torch_rng(seed: int, step: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the generator of this (seed, step, purpose) on `device`, for large draws such as noise.

    CPU and CUDA generators give different numbers for the same seed.
    """
    import torch

    number = int.from_bytes(_digest(seed, step, purpose)[:8], "little") >> 1
    return torch.Generator(device=device).manual_seed(number)
