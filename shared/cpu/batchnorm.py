"""Batch norm with accurate statistics of large batches on CPUs."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PART = 2048  # values of a channel that are added up at a time


class BatchNorm2d(nn.BatchNorm2d):
    """torch's layer, with accurate statistics where torch's own are not.

    On a CPU, torch adds up a channels_last fp32 batch value by value in fp32. From several hundred images of 32x32 on,
    outputs are then off by 5e-5, and gradients of a wide residual network by several times their rounding error. Sums
    of parts, as here, are as exact as without channels_last.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.affine and loses_precision(input)):
            return super().forward(input)
        output, mean, variance = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            update_running(self, mean, variance, input.numel() // input.shape[1])
        return output


def loses_precision(x: Tensor) -> bool:
    """Return whether torch's own batch statistics of [N, C, H, W] are inaccurate: many fp32 values in channels_last."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() // x.shape[1] > 16 * PART
            and not torch.compiler.is_compiling() and x.is_contiguous(memory_format=torch.channels_last))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and (biased) variance [C] of [N, C, ...] over all other dimensions, by parts of the batch."""
    parts = x.split(max(1, PART * x.shape[1] // x[:1].numel()))
    means, variances = (torch.stack(values) for values in zip(
        *(torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts), strict=True))
    return combine(means, variances, means.new_tensor([len(part) for part in parts]))


def combine(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance [C] of the union of parts, from means and variances [P, C] and sizes [P] of the parts.

    Not by sums of squares, which cancel if the mean is large beside the standard deviation.
    """
    fractions = (counts / counts.sum()).unsqueeze(1)
    mean = (means * fractions).sum(0)
    return mean, ((variances + (means - mean) ** 2) * fractions).sum(0)


@torch.no_grad()
def update_running(layer: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """Move the running statistics of a layer towards those of a batch of `count` values a channel."""
    layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    if momentum is None:  # the mean of all batches; a tensor, to avoid a wait for the GPU
        momentum = 1 / layer.num_batches_tracked.to(layer.running_mean.dtype)
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
    layer.running_var.lerp_((variance * (count / (count - 1))).to(layer.running_var.dtype), momentum)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, and the mean and variance [C] of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = statistics(x)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        return *torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, scale, True, ctx.eps, needed), None
