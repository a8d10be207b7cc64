"""Batch norm with accurate statistics on CPUs: of large batches, and of the global batch of several ranks."""
from __future__ import annotations

import torch
import torch.distributed as dist
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
    momentum = 1.0 / layer.num_batches_tracked.item() if layer.momentum is None else layer.momentum
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


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of [N, C, ...] over the batches of all ranks, by collectives of the default process group.

    Ranks may hold different N. Statistics are computed in fp32 at least; the output has the input's dtype and layout.
    """

    @classmethod
    def take_over(cls, layer: nn.modules.batchnorm._BatchNorm) -> GlobalBatchNorm:
        """Return a layer that shares the parameters and buffers of `layer`."""
        ours = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(ours, name, getattr(layer, name))
        return ours.train(layer.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {input.dim()} dimension(s)")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        output, mean, variance, count = _NormaliseGlobal.apply(input, self.weight, self.bias, self.eps)
        if self.training and self.running_mean is not None and self.track_running_stats:
            update_running(self, mean, variance, count)
        return output


class _NormaliseGlobal(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias with mean and variance over all dimensions but 1 of all ranks.

    Gradients are those of torch's SyncBatchNorm: exact for the input, this rank's part for weight and bias, which
    data-parallel training then averages.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None,
                eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        ours = torch.cat([*statistics(wide), wide.new_tensor([x.numel() / x.shape[1]])])
        parts = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, ours)
        means, variances, counts = torch.stack(parts).split([x.shape[1], x.shape[1], 1], dim=1)
        mean, variance = combine(means, variances, counts.flatten())
        total = counts.sum()
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(wide, mean, variance, weight, bias, False, 0.0, eps).to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale, total = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        dims = [d for d in range(x.dim()) if d != 1]
        wide = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        grad_bias, grad_weight = wide.sum(dims), (wide * normalised).sum(dims)
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums)
        mean_grad, mean_product = (sums / total).chunk(2)
        grad_x = wide - mean_grad.view(shape) - normalised * mean_product.view(shape)
        grad_x *= (scale if weight is None else scale * weight).view(shape)
        if weight is None:
            grad_weight = grad_bias = None
        return grad_x.to(x.dtype), grad_weight, grad_bias, None
