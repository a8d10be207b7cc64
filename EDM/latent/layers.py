"""The layers shared by transformers on image patches: U-ViT (EDM/latent/uvit.py) and DiT (DDAE/DiT/network.py)."""
from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoid(t: Tensor, size: int) -> Tensor:
    """Return [cos | sin] of t times geometric frequencies from 1 down to 1/10000: [N] -> float32 [N, size].

    An odd size ends with a column of zeros.
    """
    half = size // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, size % 2))


def unpatchify(tokens: Tensor, channels: int) -> Tensor:
    """Put tokens [N, side^2, P * P * C] of a square grid together: [N, C, side * P, side * P].

    A token's numbers go row by row through its patch, all channels of a pixel side by side.
    """
    side, patch = math.isqrt(tokens.shape[1]), math.isqrt(tokens.shape[2] // channels)
    grid = tokens.reshape(len(tokens), side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), channels, side * patch, side * patch)


class PatchEmbed(nn.Module):
    """Image [N, C, S, S] -> tokens [N, (S / patch)^2, width], row by row."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class Attention(nn.Module):
    """Multi-head attention of tokens [N, L, width] to each other.

    scale: factor of the scores; None: 1 / sqrt(width of a head). full_precision: scores and their mean in fp32 (fp64
    if the network is), even under autocast.
    """

    full_precision = False

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.num_heads, width // self.num_heads)
        parts = qkv.permute(2, 0, 3, 1, 4)
        with self._arithmetic(x.device):
            if self.full_precision and parts.itemsize < 4:
                parts = parts.float()
            mixed = F.scaled_dot_product_attention(*parts, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))

    def _arithmetic(self, device: torch.device) -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, enabled=False) if self.full_precision else contextlib.nullcontext()


class Mlp(nn.Module):
    """Two layers with a GELU in between: exact, or "tanh"."""

    def __init__(self, width: int, hidden: int, gelu: str = "none") -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))
