"""The U-Net of ddpmpp computed the plain eager way, as published: what the benchmarks compare with.

NCHW, resampling by depthwise convolutions with tiled filters, weights cast and biases added apart from the
convolutions, attention by einsum with its weights in float32.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from EDM.layers import Conv2d, GroupNorm, Linear
from EDM.networks import SongUNet, UNetBlock


def linear(layer: Linear, x: Tensor) -> Tensor:
    x = x @ layer.weight.to(x.dtype).t()
    return x if layer.bias is None else x.add_(layer.bias.to(x.dtype))


def conv2d(layer: Conv2d, x: Tensor) -> Tensor:
    channels = x.shape[1]
    if layer.up:
        taps = layer.resample_filter.to(x.dtype).mul(4).tile([channels, 1, 1, 1])
        x = F.conv_transpose2d(x, taps, groups=channels, stride=2, padding=(taps.shape[-1] - 1) // 2)
    if layer.down:
        taps = layer.resample_filter.to(x.dtype).tile([channels, 1, 1, 1])
        x = F.conv2d(x, taps, groups=channels, stride=2, padding=(taps.shape[-1] - 1) // 2)
    if layer.weight is None:
        return x
    x = F.conv2d(x, layer.weight.to(x.dtype), padding=layer.kernel // 2)
    return x if layer.bias is None else x.add_(layer.bias.to(x.dtype).reshape(1, -1, 1, 1))


def group_norm(layer: GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.groups, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def block(layer: UNetBlock, x: Tensor, emb: Tensor) -> Tensor:
    start = x
    x = conv2d(layer.conv0, F.silu(group_norm(layer.norm0, x)))
    x = F.silu(group_norm(layer.norm1, x.add_(linear(layer.affine, emb)[:, :, None, None].to(x.dtype))))
    x = conv2d(layer.conv1, layer.dropout(x))
    x = x.add_(start if layer.skip is None else conv2d(layer.skip, start)) * layer.skip_scale
    if not layer.heads:
        return x
    n, channels = x.shape[0] * layer.heads, x.shape[1] // layer.heads
    q, k, v = conv2d(layer.qkv, group_norm(layer.norm2, x)).reshape(n, channels, 3, -1).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(channels)).float()).softmax(dim=2).to(q.dtype)
    attended = torch.einsum("nqk,nck->ncq", weights, v)
    return conv2d(layer.proj, attended.reshape(*x.shape)).add_(x) * layer.skip_scale


def forward(net: SongUNet, x: Tensor, noise_labels: Tensor, class_labels: Tensor,
            augment_labels: Tensor | None = None) -> Tensor:
    """Return what net(...) does, for a network with standard encoder and decoder."""
    emb = net.map_noise(noise_labels)
    emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)
    emb = emb + linear(net.map_label, class_labels * math.sqrt(class_labels.shape[1]))
    if augment_labels is not None:
        emb = emb + linear(net.map_augment, augment_labels)
    emb = F.silu(linear(net.map_layer1, F.silu(linear(net.map_layer0, emb))))
    skips = []
    for layer in net.enc.values():
        x = block(layer, x, emb) if isinstance(layer, UNetBlock) else conv2d(layer, x)
        skips.append(x)
    for name, layer in net.dec.items():
        if "aux_norm" in name:
            x = group_norm(layer, x)
        elif "aux_conv" in name:
            x = conv2d(layer, F.silu(x))
        else:
            x = block(layer, torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
    return x
