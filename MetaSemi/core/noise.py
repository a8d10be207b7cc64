"""Random numbers inside networks as a function of (seed, step): for dropout of channels and for Shake-Shake gates.

They are drawn for the global batch and each rank takes its images, so a run is the same on any number of ranks and
needs no generator state to be resumed.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.distributed import World
from shared.training.randomness import torch_rng


class Noise:
    """A source of uniform numbers in [0, 1); without a generator torch's own is used, for this rank alone."""

    def __init__(self, generator: torch.Generator | None = None, world: World | None = None) -> None:
        self.generator, self.world = generator, world or World()

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return float32 numbers of `shape`, images first, on the device of `like`."""
        if self.generator is None:
            return torch.rand(shape, device=like.device)
        count = shape[0] * self.world.size
        drawn = torch.rand((count, *shape[1:]), generator=self.generator, device=self.generator.device)
        return drawn[self.world.slice(count)].to(like.device, non_blocking=True)


class Noisy(nn.Module):
    """A layer that draws; `set_noise` gives all those of a network one source."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()


class ChannelDropout(Noisy):
    """Zero whole channels of x [N, C, H, W] with probability `p` in training and divide the others by 1 - p.

    Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015; torch's Dropout2d.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = self.noise.uniform((*x.shape[:2], 1, 1), x) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


def set_noise(net: nn.Module, seed: int, step: int, world: World) -> None:
    """Choose what `net` draws in the passes of `step`; they must come in the same order each time."""
    layers = [layer for layer in net.modules() if isinstance(layer, Noisy)]
    if layers:
        noise = Noise(torch_rng(seed, step, "network noise", world.device), world)
        for layer in layers:
            layer.noise = noise
