"""Masked Siamese Networks (Assran et al., ECCV 2022, arXiv 2204.07141): targets, loss, schedules, projection head."""
from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared import distributed
from shared.distributed import World

ONE = World()


def projection_head(width: int, hidden: int = 2048, out: int = 256) -> nn.Sequential:
    """Return the head that follows the class token in pre-training: [N, width] -> [N, out]."""
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(width, hidden), bn1=nn.BatchNorm1d(hidden), gelu1=nn.GELU(),
        fc2=nn.Linear(hidden, hidden), bn2=nn.BatchNorm1d(hidden), gelu2=nn.GELU(),
        fc3=nn.Linear(hidden, out)))


def initial_prototypes(count: int, width: int) -> nn.Parameter:
    """Return prototypes [count, width], uniform in +-1 / sqrt(width)."""
    bound = width ** -0.5
    return nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))


def log_assignments(z: Tensor, prototypes: Tensor, temperature: float = 0.1) -> Tensor:
    """Return log p(z), the log-softmax of cosine similarities over the temperature: [N, D], [K, D] -> [N, K]."""
    similarity = F.normalize(z, dim=1) @ F.normalize(prototypes, dim=1).T
    return (similarity / temperature).log_softmax(1)


@torch.no_grad()
def targets(z: Tensor, prototypes: Tensor, temperature: float = 0.1, sharpen: float = 0.25, balance: bool = True,
            world: World = ONE) -> Tensor:
    """Return sharpened assignments of target views, [B, K]; with `balance`, Sinkhorn's of all ranks together."""
    sharp = (log_assignments(z.detach(), prototypes, temperature) / sharpen).softmax(1)
    if not balance:
        return sharp
    everything = sinkhorn(distributed.gather(sharp, world))
    return everything[world.rank * len(z):(world.rank + 1) * len(z)]


@torch.no_grad()
def sinkhorn(assignments: Tensor, rounds: int = 3) -> Tensor:
    """Return assignments [B, K] >= 0 whose prototypes are used about equally; each row sums to 1."""
    p = assignments / assignments.sum()
    count, prototypes = p.shape
    for _ in range(rounds):
        p = p / (p.sum(0, keepdim=True) * prototypes)
        p = p / (p.sum(1, keepdim=True) * count)
    return p * count


def loss_terms(anchors: Tensor, wanted: Tensor, prototypes: Tensor, temperature: float = 0.1,
               world: World = ONE) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cross-entropy with the targets, me-max, entropy), each a scalar; a weighted sum of them is minimised.

    anchors: [V * B, D], view by view. wanted: targets [B, K]. me-max is log K less the entropy of the mean assignment
    over all anchors of all ranks: 0 if all prototypes are used equally.
    """
    log_p = log_assignments(anchors, prototypes, temperature)
    p = log_p.exp()
    cross_entropy = -(wanted.repeat(len(anchors) // len(wanted), 1) * log_p).sum(1).mean()
    mean = distributed.sum_with_gradient(p.mean(0), world) / world.size
    me_max = math.log(p.shape[1]) + torch.xlogy(mean, mean).sum()
    return cross_entropy, me_max, -(p * log_p).sum(1).mean()


# ----------------------------------------------------------------------------------------------------------- schedules

STRETCH = 1.25  # of the periods, so no schedule reaches its end


def learning_rate(step: int, total: int, warmup: int, start: float, peak: float, final: float) -> float:
    """Return the rate of step 1, 2, ... of `total`: linear in `warmup` steps, then a cosine towards `final`."""
    if step < warmup:
        return start + step / warmup * (peak - start)
    progress = (step - warmup) / max(1, int(STRETCH * total) - warmup)
    return max(final, final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def weight_decay(step: int, total: int, first: float, final: float) -> float:
    """Return the weight decay of step 1, 2, ...: a cosine from `first` towards `final`."""
    progress = step / int(STRETCH * total)
    return min(final, final + (first - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def target_momentum(step: int, total: int, first: float = 0.996) -> float:
    """Return the momentum of the target network after step 0, 1, ...: linear towards 1."""
    return first + (1 - first) * step / (STRETCH * total)
