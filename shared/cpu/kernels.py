"""Operations of U-Nets that are faster than PyTorch's own, with the same numbers up to rounding: group normalisation of
channels_last tensors on a CPU, attention, repetition fused with a convolution.
"""
from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F


def is_channels_last(x: torch.Tensor) -> bool:
    """Return whether x [N, C, H, W] lies in memory as [N, H, W, C] and not as [N, C, H, W]."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return softmax(q kᵀ / √channels) v for q, k, v [N, heads, pixels, channels]."""
    if q.device.type == "cpu" and q.shape[2] <= 1024 and not torch.compiler.is_compiling():
        # A CPU multiplies whole matrices of this size faster than the tiles of the flash kernel.
        n, heads = q.shape[:2]
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
        return torch.bmm(scores.softmax(dim=2), v).unflatten(0, (n, heads))
    if q.is_cuda and q.stride(-1) != 1:  # fused kernels take nothing else
        q, k, v = (part.contiguous() for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def repeat_then_convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Double height and width of x [N, in, H, W] by repeating every pixel, then convolve by `weight` [out, in, 3, 3].

    One transposed convolution of stride 2 does both with 4 multiplications per output value in place of 9.
    """
    weight = weight.flip(2, 3)
    weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
    weight = (F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))).transpose(0, 1)
    return F.conv_transpose2d(x, weight.to(x.dtype), bias, stride=2, padding=1)


def group_norm(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise x [N, C, H, W] over groups of channels; the result has the dtype of x, also under autocast."""
    if ChannelsLastGroupNorm.is_faster(x):
        return ChannelsLastGroupNorm.apply(x, weight, bias, groups, eps)
    # Autocast would make float32 of half precision; the kernel sums in float32 anyway.
    widens = x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if widens else contextlib.nullcontext():
        return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


class ChannelsLastGroupNorm(torch.autograd.Function):
    """Group normalisation of channels_last tensors on a CPU, up to 10 times as fast as PyTorch's own kernels."""

    @staticmethod
    def is_faster(x: torch.Tensor) -> bool:
        """Return whether this kernel beats PyTorch's for x: it handles one image at a time, so they must be large."""
        large = x[0].numel() >= (32768 if x.dtype == torch.float32 else 8192)
        return large and x.device.type == "cpu" and is_channels_last(x) and not torch.compiler.is_compiling()

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
                ) -> torch.Tensor:
        n, c, height, width = x.shape
        if height * width >= 1024:
            out, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, height * width, groups, eps)
        else:
            out, mean, rstd = _by_batch_norm(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        n, c, height, width = x.shape
        groups = mean.shape[1]
        grad = grad.contiguous(memory_format=torch.channels_last)
        # With x̂ = (x - mean)·rstd: sums over pixels of grad and of grad·x̂, [n, c]. Exactly these are what the backward
        # pass of batch normalisation with fixed statistics computes, in float32 and without a temporary.
        means, scales = (value.float().repeat_interleave(c // groups, dim=1) for value in (mean, rstd))
        sums = [torch.ops.aten.native_batch_norm_backward(grad[i:i + 1], x[i:i + 1], weight, means[i], scales[i] ** -2,
                                                          None, None, False, 0.0, [False, True, True])[1:]
                for i in range(n)]
        of_products, of_grad = (torch.stack(part) for part in zip(*sums, strict=True))
        # grad_x = rstd·(weight·grad - mean over the group of weight·grad - x̂·mean over the group of weight·grad·x̂)
        mean_products, mean_grad = ((part * weight).view(n, groups, -1).sum(2) / (c // groups * height * width)
                                    for part in (of_products, of_grad))
        slope = (-rstd.float() ** 2 * mean_products).repeat_interleave(c // groups, dim=1)
        offset = -scales * mean_grad.repeat_interleave(c // groups, dim=1) - slope * means
        per_pixel = [part[:, :, None, None].to(x.dtype) for part in (offset, slope, scales * weight)]
        grad_x = torch.addcmul(per_pixel[0], x, per_pixel[1]).addcmul_(grad, per_pixel[2])
        return grad_x, of_products.sum(0), of_grad.sum(0), None, None


def _by_batch_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
                             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normalised x [N, C, H, W] (channels_last, on a CPU), and mean and 1 / std [N, groups].

    Batch normalisation of one image gives mean and variance of every channel; given those of its group instead, it
    normalises. PyTorch's group normalisation takes up to 9 times as long on images below 32x32.
    """
    n, c = x.shape[:2]
    zeros, ones = weight.new_zeros(c), weight.new_ones(c)
    statistics = [torch.batch_norm_update_stats(x[i:i + 1], zeros, ones, 0.0) for i in range(n)]
    means, variances = (torch.stack(part).view(n, groups, -1) for part in zip(*statistics, strict=True))
    mean = means.mean(dim=2)
    variance = variances.mean(dim=2) + (means - mean[:, :, None]).square().mean(dim=2) + eps
    per_channel = [part.repeat_interleave(c // groups, dim=1) for part in (mean, variance)]
    out, none = torch.empty_like(x), weight.new_empty(0)
    for i in range(n):
        torch.ops.aten.native_batch_norm.out(x[i:i + 1], weight, bias, per_channel[0][i], per_channel[1][i], False, 0.0,
                                             0.0, out=out[i:i + 1], save_mean=none, save_invstd=none)
    return out, mean, variance.rsqrt()
