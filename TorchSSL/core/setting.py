"""What an algorithm may know of the run besides its options and its batches."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shared import distributed
from shared.distributed import World
from shared.training.randomness import numpy_rng, torch_rng


@dataclass(frozen=True)
class Setting:
    """The data and the ranks of a run. Reductions make the state of an algorithm that of the global batch."""

    num_classes: int
    num_unlabeled: int
    class_shares: tuple[float, ...]  # of the labelled images
    world: World
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return self.world.device

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the mean over ranks, without gradient."""
        return distributed.mean(tensor, self.world)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks, without gradient."""
        return distributed.sum_(tensor, self.world)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate over ranks, without gradient."""
        return distributed.gather(tensor, self.world)

    def sum_with_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks; its gradient reaches every rank's part."""
        if self.world.size == 1:
            return tensor
        # Every rank descends the same loss of the sum, and gradients are averaged over ranks: with the plain sum in the
        # forward pass and the identity (times ranks, for that average) in the backward pass, each part counts once.
        return self.sum(tensor) + (tensor - tensor.detach()) * self.world.size

    def rng(self, step: int, purpose: str) -> np.random.Generator:
        """Return the host generator of a step, the same on every rank."""
        return numpy_rng(self.seed, step, purpose)

    def normal(self, like: torch.Tensor, step: int, purpose: str) -> torch.Tensor:
        """Return this rank's part of normal noise for the global batch, of the shape, type and device of `like`."""
        count = len(like) * self.world.size
        generator = torch_rng(self.seed, step, purpose, like.device)
        noise = torch.randn(count, *like.shape[1:], generator=generator, dtype=like.dtype, device=like.device)
        return noise[self.world.slice(count)]
