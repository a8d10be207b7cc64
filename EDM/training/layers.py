"""The layers of EDM's U-Nets: linear and convolution layers, resampling, normalisation, noise-level embeddings, and the
residual block.

Layers compute in the dtype of their input (weights stay fp32 and are cast), so a network runs in fp16, bf16 or fp32,
with autocast or without, in NCHW or channels_last memory.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.cpu.kernels import attention, group_norm, repeat_then_convolve
from shared.cpu.winograd import convolve
from shared.training.randomness import Dropout


@dataclass(frozen=True)
class Init:
    """Initial weights: {xavier, kaiming}_{uniform, normal}, and the gains of the weight and of the bias."""

    mode: str = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def parameters(self, shape: Sequence[int], bias: bool) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
        """Draw the weight of `shape` [out, in, ...] and the bias [out] (None without) from torch's global generator."""
        scheme, distribution = self.mode.split("_")
        field = math.prod(shape[2:])
        fan_in, fan_out = shape[1] * field, shape[0] * field
        gain, fan = (2, fan_in + fan_out) if scheme == "xavier" else (1, fan_in)  # variance: gain / fan

        def draw(size: Sequence[int], factor: float) -> torch.nn.Parameter:
            # In place: fresh memory costs as much as the numbers.
            if distribution == "uniform":
                values = torch.rand(size).mul_(2).sub_(1).mul_(math.sqrt(3 * gain / fan))
            else:
                values = torch.randn(size).mul_(math.sqrt(gain / fan))
            return torch.nn.Parameter(values.mul_(factor))

        weight = draw(shape, self.weight)
        return weight, draw(shape[:1], self.bias) if bias else None


DEFAULT_INIT = Init()


class Linear(torch.nn.Module):
    """y = x Wᵀ + b for x [..., in_features]."""

    casts_weights = True

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

    casts_weights = True

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
            return repeat_then_convolve(x, self.weight, bias)
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

    casts_weights = True

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, self.eps)


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


class UNetBlock(torch.nn.Module):
    """A residual block, conditioned on the embedding, with self-attention if `heads` > 0.

    The embedding [N, emb_channels] either is added to the features (`adaptive_scale` False) or scales and shifts them.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, init: Init, init_zero: Init,
                 init_attn: Init | None = None, up: bool = False, down: bool = False, heads: int = 0,
                 dropout: float = 0.0, skip_scale: float = 1.0, eps: float = 1e-5,
                 resample_filter: Sequence[float] = (1, 1), resample_proj: bool = False,
                 adaptive_scale: bool = True) -> None:
        super().__init__()
        self.heads, self.skip_scale, self.adaptive_scale = heads, skip_scale, adaptive_scale
        resample = dict(up=up, down=down, resample_filter=resample_filter)
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, init=init, **resample)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.dropout = Dropout(dropout)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, init=init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, init=init, **resample)
        if heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, kernel=1, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, init=init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        affine = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = affine.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + affine))
        h = self.conv1(self.dropout(h))
        x = self._merge(h, x if self.skip is None else self.skip(x))
        return self._merge(self.proj(self._attend(self.norm2(x))), x) if self.heads else x

    def _merge(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h + x if self.skip_scale == 1 else (h + x).mul_(self.skip_scale)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        # The published rows are ordered (head, channel, q|k|v). Attention wants q, k and v apart, and weights are
        # cheaper to reorder than activations.
        weight = self.qkv.weight.view(self.heads, -1, 3, c).permute(2, 0, 1, 3).reshape(3 * c, c, 1, 1)
        # As one tensor of its own, since torch.compile takes no reordered view for the bias of a convolution.
        bias = torch.cat([self.qkv.bias[part::3] for part in range(3)])
        qkv = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv)
        out = attention(q, k, v).transpose(2, 3).reshape(n, c, height, width)
        # Attention leaves channels last in memory; the rest of an NCHW network would follow.
        return out.contiguous() if x.is_contiguous() else out


def store_bf16_weights(net: torch.nn.Module) -> None:
    """Round the weights of convolutions and linear layers to bf16, which autocast would do in every call. For a network
    that is not trained further; under autocast its numbers stay the same."""
    for module in net.modules():
        # Where a repetition is fused with a convolution, weights are summed before they are rounded.
        if isinstance(module, (Conv2d, Linear)) and module.weight is not None and not getattr(module, "repeats", False):
            module.weight.data = module.weight.data.to(torch.bfloat16)
