"""One step of MetaSemi for any network: pseudo-labels that are corrected by the gradient of the labelled loss.

Zhang et al., "Semi-Supervised Learning with Meta-Gradient", AISTATS 2021 (arXiv 2007.03966), Algorithm 1. Six passes:

    eval mode   1  labelled images      g = gradient of their cross-entropy over all parameters theta
                2  unlabelled images    p0 = softmax f(theta), the first pseudo-label
                3, 4                    p+ and p- = softmax f(theta +- e g), with e = epsilon / |g|
                                        G = (p+ - p-) / e, the meta-gradient; y = p0 - rate G, clipped, normalised
    train mode  5  mixed images         KL to the mixed targets (or cross-entropy of the labelled ones)
                6  unlabelled images    squared distance of the softmax to y

G is 2 J g to first order, J the Jacobian of the softmax over theta: how the labelled loss after one step down the
squared distance reacts to the pseudo-label. `MetaGradient(exact=True)` computes 2 J g itself, by forward-mode
differentiation.

Parameters are never written to in passes 1 to 4: the perturbed ones are copies. Nothing waits for the device.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared import distributed
from shared.distributed import World
from shared.training.precision import cast_weights


@dataclass(frozen=True)
class MetaGradient:
    """How pseudo-labels are corrected.

    epsilon: L2 norm of the perturbation of the parameters, > 0. exact: forward-mode differentiation in place of the
    finite difference. local: every rank takes the gradient of its own labelled images, as the original does; otherwise
    that of the global batch. scale: factor on the meta-rate, which is the learning rate as published. autocast: dtype
    of passes 1, 2, 5 and 6 (None: that of the network). The perturbation is small beside the spacing of 16-bit
    numbers, so what differentiates over it (3, 4, and the exact way) always has the precision of the parameters.
    """

    epsilon: float = 1e-2
    exact: bool = False
    local: bool = False
    scale: float = 1.0
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class PseudoLabels:
    """Passes 1 to 4, without gradient; n labelled and m unlabelled images of this rank, C classes.

    targets [m, C]: the corrected pseudo-labels y. initial [m, C]: p0. meta_grad [m, C]: G. gradient: g, one tensor for
    each trainable parameter. norm [], step []: |g| and e (0 where |g| is 0; G then is 0). label_logits [n, C] and
    unlabel_logits [m, C]: of passes 1 and 2. perturbed: logits [m, C] of passes 3 and 4, None if exact.
    """

    targets: Tensor
    initial: Tensor
    meta_grad: Tensor
    gradient: list[Tensor]
    norm: Tensor
    step: Tensor
    label_logits: Tensor
    unlabel_logits: Tensor
    perturbed: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class StepResult:
    """The results of a step, detached, on the device.

    loss []: the total that was descended. label_loss []: cross-entropy of pass 1 with mix-up, of pass 5 without.
    unlabel_loss []: unweighted. label_logits [n, C]: of the same pass as label_loss. unlabel_logits [m, C]: pass 6.
    With mix-up: interp_loss [], interp_target and interp_logits [n, C], else None.
    """

    loss: Tensor
    label_loss: Tensor
    unlabel_loss: Tensor
    label_logits: Tensor
    unlabel_logits: Tensor
    pseudo: PseudoLabels
    interp_loss: Tensor | None = None
    interp_target: Tensor | None = None
    interp_logits: Tensor | None = None


def meta_step(net: nn.Module, optimizer: torch.optim.Optimizer, labeled: Tensor, labels: Tensor, unlabeled: Tensor, *,
              rate: float, weight: float = 1.0, lam: Tensor | None = None, meta: MetaGradient | None = None,
              world: World | None = None) -> StepResult:
    """Do one step: correct the pseudo-labels, then descend the losses of passes 5 and 6 with learning rate `rate`.

    net: any module that maps images to logits, not wrapped in DistributedDataParallel (gradients are averaged here);
    left in train mode. For several ranks to equal one, convert it with shared.distributed.sync_batchnorm before.
    labeled [n, ...], unlabeled [m, ...]: this rank's part of the batch, normalised; labels: int64 [n].
    rate: the learning rate and meta-rate of this step. weight: of the unlabelled loss. lam: mix-up coefficients [n, 1]
    of the labelled images (n = m, partners share a position), None for no mix-up.
    """
    meta, world = meta or MetaGradient(), world or World()
    pseudo = pseudo_labels(net, labeled, labels, unlabeled, rate, meta, world)
    net.train()
    optimizer.zero_grad(set_to_none=True)
    # Each loss goes backward by itself: only one pass's activations are in memory; gradients add up.
    mixed: tuple[Tensor | None, ...] = (None, None, None)
    if lam is None:
        label_logits = forward(net, labeled, meta.autocast)
        supervised = label_loss = F.cross_entropy(label_logits, labels)
    else:
        images, target = mix(labeled, labels, unlabeled, pseudo.targets, lam)
        logits = forward(net, images, meta.autocast)
        supervised = divergence(target, logits)
        label_logits, label_loss = pseudo.label_logits, F.cross_entropy(pseudo.label_logits, labels)
        mixed = (supervised.detach(), target, logits.detach())
    supervised.backward()
    unlabel_logits = forward(net, unlabeled, meta.autocast)
    unlabel_loss = squared_distance(unlabel_logits, pseudo.targets)
    (weight * unlabel_loss).backward()
    descend(net, optimizer, rate, world)
    return StepResult((supervised + weight * unlabel_loss).detach(), label_loss.detach(), unlabel_loss.detach(),
                      label_logits.detach(), unlabel_logits.detach(), pseudo, *mixed)


def supervised_step(net: nn.Module, optimizer: torch.optim.Optimizer, labeled: Tensor, labels: Tensor,
                    unlabeled: Tensor | None = None, *, rate: float, lam: Tensor | None = None,
                    autocast: torch.dtype | None = None, world: World | None = None) -> StepResult:
    """Do one step of the baseline: cross-entropy of the labelled images, or with `lam` the mix-up loss alone.

    With mix-up the target of an unlabelled image is its own prediction in eval mode, not corrected; `pseudo` of the
    result then holds it, with a meta-gradient of nothing. Arguments as in `meta_step`.
    """
    world = world or World()
    optimizer.zero_grad(set_to_none=True)
    if lam is None:
        net.train()
        logits = forward(net, labeled, autocast)
        loss = F.cross_entropy(logits, labels)
        result = StepResult(loss.detach(), loss.detach(), loss.new_zeros(()), logits.detach(), logits[:0].detach(),
                            no_correction(logits[:0].detach(), logits.detach()))
    else:
        net.eval()
        with torch.no_grad():
            label_logits, unlabel_logits = (forward(net, images, autocast) for images in (labeled, unlabeled))
        pseudo = no_correction(unlabel_logits, label_logits)
        net.train()
        images, target = mix(labeled, labels, unlabeled, pseudo.targets, lam)
        logits = forward(net, images, autocast)
        loss = divergence(target, logits)
        result = StepResult(loss.detach(), F.cross_entropy(label_logits, labels), loss.new_zeros(()), label_logits,
                            unlabel_logits, pseudo, loss.detach(), target, logits.detach())
    loss.backward()
    descend(net, optimizer, rate, world)
    return result


def pseudo_labels(net: nn.Module, labeled: Tensor, labels: Tensor, unlabeled: Tensor, rate: float, meta: MetaGradient,
                  world: World) -> PseudoLabels:
    """Do passes 1 to 4; `net` is left in eval mode with its parameters and buffers untouched."""
    net.eval()
    named = {name: value for name, value in net.named_parameters() if value.requires_grad}
    label_logits = forward(net, labeled, meta.autocast)
    gradient = list(torch.autograd.grad(F.cross_entropy(label_logits, labels), list(named.values()),
                                        allow_unused=True, materialize_grads=True))
    with torch.no_grad():
        if not meta.local:
            gradient = averaged(gradient, world)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradient)))
        step = torch.where(norm > 0, meta.epsilon / norm, torch.zeros_like(norm))
        if meta.exact:
            unlabel_logits, meta_grad = exact_meta_gradient(net, named, gradient, unlabeled)
            perturbed = None
        else:
            unlabel_logits = forward(net, unlabeled, meta.autocast)
            perturbed = perturbed_logits(net, named, gradient, step, unlabeled)
            difference = perturbed[0].softmax(1) - perturbed[1].softmax(1)
            meta_grad = difference / torch.where(step > 0, step, torch.ones_like(step))
        initial = unlabel_logits.softmax(1)
        targets = corrected(initial, meta_grad, rate * meta.scale)
    return PseudoLabels(targets, initial, meta_grad, gradient, norm, step, label_logits.detach(), unlabel_logits,
                        perturbed)


def perturbed_logits(net: nn.Module, named: dict[str, Tensor], gradient: Sequence[Tensor], step: Tensor,
                     images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits at theta + step g and at theta - step g: passes 3 and 4.

    The copies are new tensors, so no cast of the parameters that autocast remembers can stand in for them.
    """
    values = [value.detach() for value in named.values()]
    change = torch._foreach_mul(list(gradient), step)
    logits = []
    for move in (torch._foreach_add, torch._foreach_sub):
        moved = dict(zip(named, move(values, change), strict=True))
        with precision(images, None):
            logits.append(wide(functional_call(net, moved, (images,))))
    return logits[0], logits[1]


def exact_meta_gradient(net: nn.Module, named: dict[str, Tensor], gradient: Sequence[Tensor],
                        images: Tensor) -> tuple[Tensor, Tensor]:
    """Return (logits of pass 2, 2 J g) from one forward-mode pass, J the Jacobian of softmax over parameters."""
    def predict(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = wide(functional_call(net, parameters, (images,)))
        return logits.softmax(1), logits

    values = {name: value.detach() for name, value in named.items()}
    # Forward-mode differentiation cannot be compiled.
    with precision(images, None), plain_attention(), torch.compiler.set_stance("force_eager"):
        _, tangent, logits = jvp(predict, (values,), (dict(zip(named, gradient, strict=True)),), has_aux=True)
    return logits, 2 * tangent


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention step by step: the kernels that do it at once have no forward-mode derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def corrected(initial: Tensor, meta_grad: Tensor, rate: float) -> Tensor:
    """Return initial - rate * meta_grad [m, C], clipped at 0, each row divided by its sum (an all-zero row by 1)."""
    moved = (initial - rate * meta_grad).clamp_(min=0)
    total = moved.sum(1, keepdim=True)
    return moved / torch.where(total == 0, torch.ones_like(total), total)


def no_correction(unlabel_logits: Tensor, label_logits: Tensor) -> PseudoLabels:
    initial, zero = unlabel_logits.softmax(1), unlabel_logits.new_zeros(())
    return PseudoLabels(initial, initial, torch.zeros_like(initial), [], zero, zero, label_logits, unlabel_logits, None)


def mix(labeled: Tensor, labels: Tensor, unlabeled: Tensor, targets: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Return images [n, ...] and targets [n, C] between labelled and unlabelled ones of the same position.

    Zhang et al., "mixup" (2018), with one coefficient in lam [n, 1] for each image.
    """
    ratio = lam.view(-1, *[1] * (labeled.dim() - 1)).to(labeled.dtype)
    # Not F.one_hot, which reads the labels back to check them.
    known = (labels[:, None] == torch.arange(targets.shape[1], device=labels.device)).to(targets.dtype)
    return ratio * labeled + (1 - ratio) * unlabeled, lam * known + (1 - lam) * targets


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return KL(target || softmax(logits)) [], summed over classes, mean over images; 0 log 0 = 0."""
    return (torch.xlogy(target, target) - target * logits.log_softmax(1)).sum() / len(logits)


def squared_distance(logits: Tensor, targets: Tensor) -> Tensor:
    """Return |softmax(logits) - targets|^2 [], summed over classes, mean over images."""
    return (logits.softmax(1) - targets).square().sum() / len(logits)


def forward(net: nn.Module, images: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the logits, in fp32 at least, of a pass in the mode that `net` is in."""
    with precision(images, dtype), cast_weights(dtype, net):
        return wide(net(images))


def precision(images: Tensor, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return a context that computes in `dtype`, or without autocast, in any context of the caller.

    Nothing cast is remembered: it would outlive the parameters' change, and save nothing within one pass.
    """
    return torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


def wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def averaged(tensors: Sequence[Tensor], world: World) -> list[Tensor]:
    """Return the means over ranks, by one message for all tensors; the tensors themselves for one rank."""
    if world.size == 1:
        return list(tensors)
    flat = distributed.mean(torch.cat([tensor.reshape(-1) for tensor in tensors]), world)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, rate: float, world: World) -> None:
    """Take one optimiser step with learning rate `rate` down the gradients, averaged over ranks."""
    if world.size > 1:
        gradients = [value.grad for value in net.parameters() if value.grad is not None]
        # Copied back: each keeps the memory layout of its parameter, on which fused optimizers rely.
        torch._foreach_copy_(gradients, averaged(gradients, world))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


# ---------------------------------------------------------------- schedules

def learning_rate(step: int, lr: float, warmup: int, gamma: float, milestones: Sequence[int]) -> float:
    """Return the rate of `step` >= 0: rising from 0 to `lr` over `warmup` steps, then times `gamma` after a milestone.

    The step that equals a milestone still has the rate before it.
    """
    if step < warmup:
        return lr * step / warmup
    return lr * gamma ** sum(step > milestone for milestone in milestones)


def compute_weight(weight: float, step: int, rampup_step: int = 4000) -> float:
    """Return the weight of the unlabelled loss at `step`: rising from 0 to `weight` over `rampup_step` steps."""
    return weight if step >= rampup_step else weight * step / rampup_step


class CosAnnealingLR:
    """The rate of every iteration: a linear rise over `warmup_epochs`, then half a cosine down to 0 (ImageNet).

    loader_len: iterations in an epoch. last_epoch: the last one done, -1 for none. Each call of `step` counts one
    iteration and returns its rate. Beyond `epochs` the cosine rises again.
    """

    def __init__(self, loader_len: int, epochs: int, lr_max: float, warmup_epochs: float, last_epoch: int = -1) -> None:
        self.lr_max = lr_max
        self.warmup, self.total = loader_len * warmup_epochs, loader_len * epochs
        self.count = (last_epoch + 1) * loader_len

    def step(self) -> float:
        self.count += 1
        if self.warmup > 0 and self.count <= self.warmup:
            return self.lr_max * self.count / self.warmup
        fraction = (self.count - self.warmup) / (self.total - self.warmup)
        return self.lr_max * (1 + math.cos(math.pi * fraction)) / 2

    def restart(self, lr_max: float | None = None) -> None:
        """Count from the beginning again, with another maximum if one is given."""
        self.lr_max, self.count = self.lr_max if lr_max is None else lr_max, 0
