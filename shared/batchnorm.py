"""Batch normalisation over the global batch, so that W ranks of batch B / W compute what one rank of batch B does."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from shared.distributed import World


def sync_batchnorm(net: nn.Module, world: World) -> nn.Module:
    """Make every batch norm of `net` use the statistics of the global batch; return the network.

    The layers are replaced in place and keep their names, parameters and buffers (a network that is itself a batch norm
    is returned replaced). With one rank nothing changes. On GPUs it is torch's SyncBatchNorm; elsewhere, where that
    refuses to work, GlobalBatchNorm. Convert before wrapping in DistributedDataParallel.
    """
    if world.size == 1:
        return net
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if isinstance(net, nn.modules.batchnorm._BatchNorm):
        return GlobalBatchNorm.take_over(net)
    for name, child in net.named_children():
        setattr(net, name, sync_batchnorm(child, world))
    return net


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
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.training and self.running_mean is not None:
            self._follow(mean, variance * (count / (count - 1)))
        return output

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias with mean and variance over all dimensions but 1 of all ranks.

    Gradients are those of torch's SyncBatchNorm: of the input exact, of weight and bias this rank's share, which
    data-parallel training then averages.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None,
                eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        dims = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(wide, dims, correction=0)
        count = mean.new_full((1,), x.numel() / x.shape[1])
        # Means and variances of the parts combine without the cancellation of sums of squares.
        parts = [torch.empty_like(torch.cat([mean, variance, count])) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, torch.cat([mean, variance, count]))
        means, variances, counts = torch.stack(parts).split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean) ** 2) * counts).sum(0) / total
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
