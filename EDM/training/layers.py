"""The layers that EDM's U-Nets are made of: initialised linear and convolution layers, resampling, normalisation,
noise-level embeddings and a dropout that is a function of the training step.

Layers compute in the dtype of their input (weights stay fp32 and are cast), so a network runs in fp16, bf16 or fp32,
with autocast or without, in NCHW or channels_last memory.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.cpu.kernels import ChannelsLastGroupNorm, repeat_then_convolve
from shared.cpu.winograd import convolve

# Initial weights before the gain: f(fan_in, fan_out, *shape). In place: fresh memory costs as much as the numbers.
INITIALISERS: dict[str, Callable[..., torch.Tensor]] = {
    "xavier_uniform": lambda fan_in, fan_out, *shape: _symmetric(shape).mul_(math.sqrt(6 / (fan_in + fan_out))),
    "xavier_normal": lambda fan_in, fan_out, *shape: torch.randn(shape).mul_(math.sqrt(2 / (fan_in + fan_out))),
    "kaiming_uniform": lambda fan_in, fan_out, *shape: _symmetric(shape).mul_(math.sqrt(3 / fan_in)),
    "kaiming_normal": lambda fan_in, fan_out, *shape: torch.randn(shape).mul_(math.sqrt(1 / fan_in)),
}


def _symmetric(shape: Sequence[int]) -> torch.Tensor:
    """Return numbers drawn uniformly from [-1, 1)."""
    return torch.rand(shape).mul_(2).sub_(1)


@dataclass(frozen=True)
class Init:
    """How a layer starts: a key of INITIALISERS, and the gains of the weight and of the bias (same distribution)."""

    mode: str = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def parameters(self, shape: Sequence[int], bias: bool) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
        """Draw the weight of `shape` [out, in, ...] and, if wanted, the bias [out] from torch's global generator."""
        field = math.prod(shape[2:])
        fan_in, fan_out = shape[1] * field, shape[0] * field
        draw = INITIALISERS[self.mode]
        weight = torch.nn.Parameter(draw(fan_in, fan_out, *shape).mul_(self.weight))
        return weight, torch.nn.Parameter(draw(fan_in, fan_out, shape[0]).mul_(self.bias)) if bias else None


DEFAULT_INIT = Init()


class Linear(torch.nn.Module):
    """y = x Wᵀ + b for x [..., in_features]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init: Init = DEFAULT_INIT) -> None:
        super().__init__()
        self.weight, self.bias = init.parameters((out_features, in_features), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(torch.nn.Module):
    """Resample by 2 up or down, then convolve (kernel 1 or 3, size-preserving), then add the bias.

    `kernel` 0 resamples only and has no parameters. With `fused_resample` a down-sampling convolution is computed
    first and filtered afterwards, which treats the border differently. x [N, in_channels, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, bias: bool = True, up: bool = False,
                 down: bool = False, resample_filter: Sequence[float] = (1, 1), fused_resample: bool = False,
                 init: Init = DEFAULT_INIT) -> None:
        super().__init__()
        self.kernel, self.up, self.down, self.fused_resample = kernel, up, down, fused_resample
        self.weight, self.bias = None, None
        if kernel:
            self.weight, self.bias = init.parameters((out_channels, in_channels, kernel, kernel), bias)
        self.box = tuple(resample_filter) == (1, 1)  # then resampling is repetition or a mean
        self.repeats = kernel == 3 and up and self.box
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        self.register_buffer("resample_filter", torch.outer(taps, taps)[None, None] / taps.sum() ** 2
                             if up or down else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.kernel:
            return self._resample(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.repeats:
            weight = repeat_then_convolve(self.weight).to(x.dtype)
            return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
        weight = self.weight.to(x.dtype)
        if self.fused_resample and self.down:
            width = self.resample_filter.shape[-1]
            x = F.conv2d(x, weight, bias, padding=self.kernel // 2 + (width - 1) // 2)
            return downsample(x, None if self.box else self.resample_filter, padding=0)
        if self.kernel == 1 and self.up:  # the two commute, and before up-sampling there are 4 times fewer pixels
            x = self._resample(F.conv2d(x, weight))
            return x if bias is None else x + bias[:, None, None]
        return convolve(self._resample(x), weight, bias)

    def _resample(self, x: torch.Tensor) -> torch.Tensor:
        taps = None if self.box else self.resample_filter
        if self.up:
            return upsample(x, taps)
        return downsample(x, taps) if self.down else x


def upsample(x: torch.Tensor, taps: torch.Tensor | None) -> torch.Tensor:
    """Double height and width of x [N, C, H, W]: zeros between pixels, filtered by 4·taps [1, 1, k, k].

    None is the filter [1, 1] ⊗ [1, 1], which repeats every pixel.
    """
    if taps is None:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return _filter(F.conv_transpose2d, x, 4 * taps, (taps.shape[-1] - 1) // 2)


def downsample(x: torch.Tensor, taps: torch.Tensor | None, padding: int | None = None) -> torch.Tensor:
    """Halve height and width of x [N, C, H, W] by a filter [1, 1, k, k] of stride 2.

    None is the filter [1, 1] ⊗ [1, 1], which averages 2x2 pixels. `padding` None: (k - 1) // 2.
    """
    if taps is None:
        return F.avg_pool2d(x, 2)
    return _filter(F.conv2d, x, taps, (taps.shape[-1] - 1) // 2 if padding is None else padding)


def _filter(convolve: Callable[..., torch.Tensor], x: torch.Tensor, taps: torch.Tensor, padding: int) -> torch.Tensor:
    """Return `convolve` with stride 2 of every channel of x by the same taps [1, 1, k, k], in the dtype of x."""
    taps = taps.repeat(x.shape[1], 1, 1, 1)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        # One channel at a time, bf16 takes up to 200 times as long as fp32 there.
        with torch.autocast("cpu", enabled=False):
            return convolve(x.float(), taps, stride=2, padding=padding, groups=len(taps)).to(x.dtype)
    return convolve(x, taps.to(x.dtype), stride=2, padding=padding, groups=len(taps))


class GroupNorm(torch.nn.Module):
    """Normalisation over groups of at least 4 channels, at most 32 groups."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if ChannelsLastGroupNorm.pays(x):
            return ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.groups, self.eps)
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PositionalEmbedding(torch.nn.Module):
    """[N] -> [N, channels]: cosines, then sines, of x·10000^(-j/J), J = channels/2 (- 1 with `endpoint`)."""

    def __init__(self, channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.half, self.endpoint = channels // 2, endpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exponents = torch.arange(self.half, dtype=torch.float32, device=x.device) / (self.half - self.endpoint)
        angles = torch.outer(x, (1 / 10000) ** exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(torch.nn.Module):
    """[N] -> [N, channels]: cosines, then sines, of 2π·f·x for fixed frequencies f ~ N(0, scale²)."""

    def __init__(self, channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(x, 2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
