"""The U-Net of DDAE computed the plain eager way, as published: what the benchmarks compare with.

NCHW, repetition ahead of convolutions, attention by two einsums over a weight tensor [N, pixels, pixels, heads].
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from DDAE.ddae.model import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    LevelBlock,
    ResampleBlock,
    ResidualBlock,
    UNet,
    Upsample,
)


def group_norm(layer: GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.groups, layer.weight, layer.bias, 1e-5)


def residual(block: ResidualBlock, x: Tensor, emb: Tensor) -> Tensor:
    h = F.silu(group_norm(block.norm1, x))
    if block.up:
        x, h = (F.interpolate(part, scale_factor=2, mode="nearest") for part in (x, h))
    elif block.down:
        x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
    h = block.conv1(h) + block.time_emb(emb)[:, :, None, None]
    h = F.silu(group_norm(block.norm2, h))
    h = block.conv2[1](F.dropout(h, block.conv2[0].p, block.training))
    return h + block.shortcut(x)


def attention(block: AttentionBlock, x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    tokens = group_norm(block.norm, x).view(n, c, -1).permute(0, 2, 1)
    qkv = block.projection(tokens).view(n, -1, block.heads, 3 * block.d_k)
    q, k, v = torch.chunk(qkv, 3, dim=-1)
    scale = block.d_k ** -0.25
    weights = torch.einsum("bihd,bjhd->bijh", q * scale, k * scale).softmax(dim=2)
    out = torch.einsum("bijh,bjhd->bihd", weights, v).reshape(n, -1, block.heads * block.d_k)
    return block.output(out).permute(0, 2, 1).reshape(n, c, height, width) + x


def any_block(block: torch.nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    if isinstance(block, LevelBlock):
        x = residual(block.res, x, emb)
        return x if block.attn is None else attention(block.attn, x)
    if isinstance(block, ResampleBlock):
        return residual(block.op, x, emb)
    if isinstance(block, Upsample):
        return block.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    if isinstance(block, Downsample):
        return block.conv(x)
    raise TypeError(type(block).__name__)


def forward(net: UNet, x: Tensor, t: Tensor, aug: Tensor | None = None) -> Tensor:
    """Return what net(x, t, aug) does."""
    emb = net.time_emb(t, aug)
    x = net.image_proj(x)
    skips = [x]
    for block in net.down:
        x = any_block(block, x, emb)
        skips.append(x)
    x = residual(net.middle.res1, x, emb)
    x = residual(net.middle.res2, attention(net.middle.attn, x), emb)
    for block in net.up:
        if isinstance(block, LevelBlock):
            x = torch.cat([x, skips.pop()], dim=1)
        x = any_block(block, x, emb)
    return net.final(F.silu(group_norm(net.norm, x)))
