"""The U-Nets of EDM computed the plain eager way, as published: what the benchmarks compare with.

NCHW, resampling by depthwise convolutions with tiled filters, weights cast and biases added apart from the
convolutions, attention by einsum with its weights in float32.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from EDM.training.layers import Conv2d, GroupNorm, Linear
from EDM.training.networks import DhariwalUNet, SongUNet, UNetBlock


def linear(layer: Linear, x: Tensor) -> Tensor:
    x = x @ layer.weight.to(x.dtype).t()
    return x if layer.bias is None else x.add_(layer.bias.to(x.dtype))


def conv2d(layer: Conv2d, x: Tensor) -> Tensor:
    channels = x.shape[1]
    if layer.fused_resample and layer.down:
        taps = layer.resample_filter.to(x.dtype)
        x = F.conv2d(x, layer.weight.to(x.dtype), padding=layer.kernel // 2 + (taps.shape[-1] - 1) // 2)
        x = F.conv2d(x, taps.tile([x.shape[1], 1, 1, 1]), groups=x.shape[1], stride=2)
        return x.add_(layer.bias.to(x.dtype).reshape(1, -1, 1, 1))
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
    affine = linear(layer.affine, emb)[:, :, None, None].to(x.dtype)
    if layer.adaptive_scale:
        scale, shift = affine.chunk(2, dim=1)
        x = F.silu(torch.addcmul(shift, group_norm(layer.norm1, x), scale + 1))
    else:
        x = F.silu(group_norm(layer.norm1, x.add_(affine)))
    x = conv2d(layer.conv1, layer.dropout(x))
    x = x.add_(start if layer.skip is None else conv2d(layer.skip, start)) * layer.skip_scale
    if not layer.heads:
        return x
    n, channels = x.shape[0] * layer.heads, x.shape[1] // layer.heads
    q, k, v = conv2d(layer.qkv, group_norm(layer.norm2, x)).reshape(n, channels, 3, -1).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(channels)).float()).softmax(dim=2).to(q.dtype)
    attended = torch.einsum("nqk,nck->ncq", weights, v)
    return conv2d(layer.proj, attended.reshape(*x.shape)).add_(x) * layer.skip_scale


def forward(net: SongUNet | DhariwalUNet, x: Tensor, noise_labels: Tensor, class_labels: Tensor,
            augment_labels: Tensor | None = None) -> Tensor:
    """Return what net(...) does, for a network with a standard or residual encoder and a standard decoder."""
    emb = embed(net, noise_labels, class_labels, augment_labels)
    skips, image = [], x
    for name, layer in net.enc.items():
        if "aux_residual" in name:
            x = skips[-1] = image = (x + conv2d(layer, image)) / math.sqrt(2)
            continue
        x = block(layer, x, emb) if isinstance(layer, UNetBlock) else conv2d(layer, x)
        skips.append(x)
    for name, layer in net.dec.items():
        if "aux_norm" in name:
            x = group_norm(layer, x)
        elif "aux_conv" in name:
            x = conv2d(layer, F.silu(x))
        else:
            x = block(layer, torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
    return conv2d(net.out_conv, F.silu(group_norm(net.out_norm, x))) if isinstance(net, DhariwalUNet) else x


def embed(net: SongUNet | DhariwalUNet, noise_labels: Tensor, class_labels: Tensor, augment_labels: Tensor | None
          ) -> Tensor:
    emb = net.map_noise(noise_labels)
    if isinstance(net, DhariwalUNet):
        if augment_labels is not None:
            emb = emb + linear(net.map_augment, augment_labels)
        emb = linear(net.map_layer1, F.silu(linear(net.map_layer0, emb)))
        return F.silu(emb + linear(net.map_label, class_labels))
    emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)
    emb = emb + linear(net.map_label, class_labels * math.sqrt(class_labels.shape[1]))
    if augment_labels is not None:
        emb = emb + linear(net.map_augment, augment_labels)
    return F.silu(linear(net.map_layer1, F.silu(linear(net.map_layer0, emb))))
