"""Batch norm over the global batch of several ranks."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from shared.cpu.batchnorm import combine, statistics, update_running


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of [N, C, ...] over the batches of all ranks, by collectives of the default process group.

    Ranks may hold different N. Statistics are computed in fp32 at least; the output has the input's dtype and layout.
    A training step costs one collective each way. Unlike torch's SyncBatchNorm, it works on CPUs, never makes the host
    wait for a GPU, takes bf16 while `track_running_stats` is off, and compiles without a break.
    """

    @classmethod
    def take_over(cls, layer: _BatchNorm) -> GlobalBatchNorm:
        """Return a layer that shares the parameters and buffers of `layer`, and timm's operations after it."""
        ours = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(ours, name, getattr(layer, name))
        for name, child in layer.named_children():  # of a layer of normalisation and activation: drop, act
            ours.add_module(name, child)
        return ours.train(layer.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {input.dim()} dimension(s)")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            output = super().forward(input)
        else:
            output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
            if self.training and self.running_mean is not None and self.track_running_stats:
                update_running(self, mean, variance, count)
        for child in self.children():
            output = child(output)
        return output


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias with mean and variance over all dimensions but 1 of all ranks.

    Gradients are exact for the input, and this rank's part for weight and bias, which data-parallel training averages.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None,
                eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        wide = x if x.dtype == torch.float64 else x.float()
        count = torch.full((1,), x.numel() / channels, dtype=wide.dtype, device=x.device)
        parts = gather_rows(torch.cat([*_statistics(wide), count]), dist.get_world_size())
        means, variances, counts = parts.split([channels, channels, 1], dim=1)
        mean, variance = combine(means, variances, counts.flatten())
        total = counts.sum()
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), total)
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(wide, mean, variance, weight, bias, False, 0.0, eps).to(x.dtype), mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale, total = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        dims = [d for d in range(x.dim()) if d != 1]
        wide = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        grad_bias, grad_weight = wide.sum(dims), (wide * normalised).sum(dims)
        mean_grad, mean_product = (sum_ranks(torch.cat([grad_bias, grad_weight])) / total).chunk(2)
        grad_x = wide - mean_grad.view(shape) - normalised * mean_product.view(shape)
        grad_x *= (scale if weight is None else scale * weight).view(shape)
        if weight is None:
            grad_weight = grad_bias = None
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and (biased) variance [C] of this rank's [N, C, ...]; a GPU's own reduction is accurate."""
    if x.device.type == "cpu":
        return statistics(x)
    variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, variance


# Operators of their own, which a compiler takes as they are instead of breaking the graph at each collective.

@torch.library.custom_op("fewlabel::gather_rows", mutates_args=())
def gather_rows(row: Tensor, ranks: int) -> Tensor:
    """Return the rows [n] of all ranks, [ranks, n]."""
    rows = row.new_empty(ranks * len(row))
    dist.all_gather_into_tensor(rows, row)
    return rows.view(ranks, len(row))


@gather_rows.register_fake
def _(row: Tensor, ranks: int) -> Tensor:
    return row.new_empty(ranks, len(row))


@torch.library.custom_op("fewlabel::sum_ranks", mutates_args=())
def sum_ranks(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks."""
    total = values.clone()
    dist.all_reduce(total)
    return total


@sum_ranks.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)
