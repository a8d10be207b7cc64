"""Labels guessed and mixed, as MixMatch and ReMixMatch do it. Every forward pass moves the batch statistics."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws
from DASO.lib.losses import cross_entropy_each
from shared.augment.mixing import Mixed, forward_mixed


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Return probabilities [n, K] to the power 1 / temperature, normalised again."""
    weights = probabilities ** (1 / temperature)
    return weights / weights.sum(1, keepdim=True)


@torch.no_grad()
def guess(learner: Algorithm, images: Tensor) -> Tensor:
    """Return the student's probabilities [n, K] of images, from a forward pass of their own in train mode."""
    return learner.model(images).softmax(1)


def mix(learner: Algorithm, batch: Batch, views: Sequence[Tensor], target: Tensor, alpha: float,
        draws: Draws) -> Mixed:
    """Mix the labelled images and `views`, whose labels are `target` [B_u, K], and classify them chunk by chunk.

    A chunk is as large as the labelled batch, which therefore must be as large as the unlabelled one.
    """
    world = learner.setting.world
    one_hot = F.one_hot(batch.labels, learner.setting.num_classes).to(target.dtype)
    inputs, targets = [batch.labelled, *views], [one_hot, *[target] * len(views)]
    share = draws.beta(alpha)
    permutation = draws.permutation(sum(map(len, inputs)) * world.size)
    return forward_mixed(lambda images, chunk: learner.model(images), world, inputs, targets, share, permutation)


def mixed_losses(learner: Algorithm, mixed: Mixed) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of images mixed from labelled ones, and MODEL.LOSS.UNLABELED_LOSS of the others."""
    each = cross_entropy_each(mixed.logits, mixed.targets)
    labelled, unlabelled = mixed.means(each)
    if learner.cfg.MODEL.LOSS.UNLABELED_LOSS == "MSELoss":
        unlabelled = mixed.means(((mixed.logits.softmax(1) - mixed.targets) ** 2).mean(1))[1]
    return labelled, unlabelled


def labelled_logits(learner: Algorithm, mixed: Mixed) -> Tensor:
    """Return the logits [B_l, K] of the images mixed from this rank's labelled ones, without gradient."""
    setting = learner.setting
    logits, rows = setting.gather(mixed.logits), setting.gather(mixed.rows)
    in_order = torch.empty_like(logits).index_copy_(0, rows, logits)
    count = mixed.size * setting.world.size
    return in_order[:count][setting.world.slice(count)]
