"""The blocks of DDAE's U-Net. Names of parameters and the order in which they are registered are the published ones, so
that published weights and optimizer states load.

Images are [N, C, H, W] in either memory order; layers compute in the dtype of their input, weights stay fp32.
"""
from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from shared.cli import UserError
from shared.cpu.kernels import ChannelsLastGroupNorm, attention, repeat_then_convolve
from shared.cpu.winograd import convolve
from shared.training.dropout import Dropout

GROUPS = 32


class GroupNorm(nn.Module):
    """Normalisation over `groups` groups of channels, eps 1e-5. Raises UserError if they do not divide evenly."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        if channels % groups:
            raise UserError(f"a layer of {channels} channels cannot be normalised in {groups} groups; "
                            f"n_channels times each of ch_mults must be a multiple of {groups}")
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if ChannelsLastGroupNorm.pays(x):
            return ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.groups, 1e-5)
        # Under autocast PyTorch would make float32 tensors of half-precision ones; the kernel sums in float32 anyway.
        half = x.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(x.device.type, enabled=False) if half else contextlib.nullcontext():
            return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-5)


class TimeEmbedding(nn.Module):
    """t [N] (or [1], for all images) and if wanted augmentation labels [N, augment_dim] -> [N, n_channels].

    Sines, then cosines of t·10000^(-k/(n_channels/8 - 1)), to which the projected labels are added, then two layers.
    t is used as it is: t/n_T or ln(σ)/4, never scaled.
    """

    def __init__(self, n_channels: int, augment_dim: int = 0) -> None:
        super().__init__()
        self.half = n_channels // 8
        if augment_dim:
            self.aug_emb = nn.Linear(augment_dim, n_channels // 4, bias=False)
        self.lin1 = nn.Linear(n_channels // 4, n_channels)
        self.lin2 = nn.Linear(n_channels, n_channels)

    def forward(self, t: torch.Tensor, aug: torch.Tensor | None = None) -> torch.Tensor:
        exponents = torch.arange(self.half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (self.half - 1))
        angles = t.to(torch.float32)[:, None] * exponents.exp()
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if aug is not None and hasattr(self, "aug_emb"):
            emb = emb + self.aug_emb(aug)
        return self.lin2(F.silu(self.lin1(emb)))


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return convolve(x, self.weight, self.bias)


class ResidualBlock(nn.Module):
    """x [N, in_channels, H, W], emb [N or 1, time_channels] -> [N, out_channels, H', W'].

    With `up` (repetition) or `down` (2x2 mean) the normalised input and the skip connection are both resampled.
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, dropout: float = 0.1, up: bool = False,
                 down: bool = False) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.norm1 = GroupNorm(GROUPS, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Sequential(Dropout(dropout), Conv3x3(out_channels, out_channels))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.norm1(x))
        if self.up:
            x, h = repeat(x), repeat_and_convolve(self.conv1, h)
        elif self.down:
            x, h = F.avg_pool2d(x, 2), self.conv1(F.avg_pool2d(h, 2))
        else:
            h = self.conv1(h)
        h = h + self.time_emb(emb)[:, :, None, None].to(h.dtype)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of x [N, n_channels, H, W], added to x; heads of `d_k` channels (None: one head).

    Raises UserError if the channels are no multiple of d_k.
    """

    def __init__(self, n_channels: int, d_k: int | None = None) -> None:
        super().__init__()
        self.d_k = n_channels if d_k is None else d_k
        self.heads = n_channels // self.d_k
        if self.heads * self.d_k != n_channels:
            raise UserError(f"attn_channels_per_head: {n_channels} channels cannot be shared by heads of {self.d_k}")
        self.norm = GroupNorm(GROUPS, n_channels)
        self.projection = nn.Linear(n_channels, 3 * self.heads * self.d_k)
        self.output = nn.Linear(self.heads * self.d_k, n_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        # The two layers as 1x1 convolutions, which oneDNN computes faster on a CPU than MKL a product of matrices.
        qkv = F.conv2d(self.norm(x), self.projection.weight[:, :, None, None], self.projection.bias)
        qkv = qkv.permute(0, 2, 3, 1).reshape(n, height * width, self.heads, 3 * self.d_k).transpose(1, 2)
        out = attention(*qkv.chunk(3, dim=3))  # [N, heads, pixels, d_k]
        out = out.transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2)
        out = F.conv2d(out, self.output.weight[:, :, None, None], self.output.bias)
        # Attention leaves it pixel by pixel in memory, which would spread through a network that stores channels apart.
        return (out.contiguous() if x.is_contiguous() else out) + x


class Upsample(nn.Module):
    """Double height and width by repetition, then if `use_conv` convolve 3x3."""

    def __init__(self, n_channels: int, use_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_channels, n_channels, 3, padding=1) if use_conv else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        return repeat(x) if self.conv is None else repeat_and_convolve(self.conv, x)


class Downsample(nn.Module):
    """Halve height and width: a 3x3 convolution of stride 2 (rounding up), without `use_conv` a 2x2 mean."""

    def __init__(self, n_channels: int, use_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_channels, n_channels, 3, stride=2, padding=1) if use_conv else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(x)


class ResampleBlock(nn.Module):
    """A residual block that doubles or halves height and width."""

    def __init__(self, n_channels: int, time_channels: int, dropout: float, up: bool = False, down: bool = False
                 ) -> None:
        super().__init__()
        self.op = ResidualBlock(n_channels, n_channels, time_channels, dropout, up=up, down=down)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.op(x, emb)


class LevelBlock(nn.Module):
    """A residual block, followed by attention if `attn`."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, attn: bool, d_k: int | None,
                 dropout: float) -> None:
        super().__init__()
        self.res = ResidualBlock(in_channels, out_channels, time_channels, dropout)
        self.attn = AttentionBlock(out_channels, d_k) if attn else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        x = self.res(x, emb)
        return x if self.attn is None else self.attn(x)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, n_channels: int, time_channels: int, d_k: int | None, dropout: float) -> None:
        super().__init__()
        self.res1 = ResidualBlock(n_channels, n_channels, time_channels, dropout)
        self.attn = AttentionBlock(n_channels, d_k)
        self.res2 = ResidualBlock(n_channels, n_channels, time_channels, dropout)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.res2(self.attn(self.res1(x, emb)), emb)


def repeat(x: torch.Tensor) -> torch.Tensor:
    """Double height and width of x [N, C, H, W] by repeating every pixel."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def repeat_and_convolve(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return conv(repeat(x)) for a 3x3 convolution, at 4/9 of its multiplications."""
    return F.conv_transpose2d(x, repeat_then_convolve(conv.weight), conv.bias, stride=2, padding=1)
