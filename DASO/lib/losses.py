"""Losses: on labelled images with unequal classes, on unlabelled ones with targets of their own."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from shared import distributed
from shared.distributed import World

if TYPE_CHECKING:
    from DASO.lib.config.config import Config

LabelledLoss = Callable[[Tensor, Tensor, int], Tensor]  # logits [n, K], labels int64 [n], iteration -> loss []
LDAM_MARGIN, LDAM_SCALE = 0.5, 30.0


def reduce(each: Tensor, weight: Tensor | None = None, avg_factor: float | None = None) -> Tensor:
    """Return the mean of per-image losses [n], times `weight` [n]; the divisor is n, or `avg_factor`.

    The divisor is not the sum of weights, as published.
    """
    if weight is not None:
        each = each * weight
    return each.mean() if avg_factor is None else each.sum() / avg_factor


def cross_entropy_each(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy [n] of logits [n, K] with classes int64 [n] or probabilities [n, K]."""
    return F.cross_entropy(logits, target, reduction="none")


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None,
                  avg_factor: float | None = None) -> Tensor:
    """Return the (weighted) mean cross-entropy; `weight` [n] of images."""
    return reduce(cross_entropy_each(logits, target), weight, avg_factor)


def consistency(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over all images of the cross-entropy with `target`, counted where `mask` [n] says."""
    return reduce(cross_entropy_each(logits, target), mask)


def squared_difference(probabilities: Tensor, target: Tensor) -> Tensor:
    """Return the mean over images and classes of (p - q)^2; both [n, K]."""
    return F.mse_loss(probabilities, target)


def unlabelled_loss(cfg: Config, logits: Tensor, target: Tensor) -> Tensor:
    """Return MODEL.LOSS.UNLABELED_LOSS, without its weight, of logits and target probabilities [n, K]."""
    if cfg.MODEL.LOSS.UNLABELED_LOSS == "MSELoss":
        return squared_difference(logits.softmax(1), target)
    return cross_entropy(logits, target)


def one_vs_all(logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Return the binary cross-entropy of every class against the others, mean over images and classes."""
    each = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype),
                                              reduction="none").mean(1)
    return reduce(each, None if class_weight is None else class_weight[labels])


def focal(logits: Tensor, labels: Tensor, gamma: float, class_weight: Tensor | None = None) -> Tensor:
    """Return the mean of (1 - p)^gamma times the cross-entropy, p the label's probability.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4, with softmax probabilities.
    """
    each = cross_entropy_each(logits, labels)
    each = (1 - torch.exp(-each)).clamp(min=0) ** gamma * each
    return reduce(each, None if class_weight is None else class_weight[labels])


def class_weights(counts: Sequence[float], beta: float, device: torch.device | str = "cpu") -> Tensor:
    """Return a weight for every class [K], their sum K: inverse to the effective number of its images.

    beta = 1: inverse to the number itself. Cui et al., "Class-Balanced Loss Based on Effective Number of Samples",
    CVPR 2019. A class without images gets the weight of one with a single image.
    """
    numbers = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
    weights = (1 - beta) / (1 - beta ** numbers) if beta < 1 else 1 / numbers
    return (weights * len(weights) / weights.sum()).to(torch.float32).to(device)


def ldam_margins(counts: Sequence[float], device: torch.device | str = "cpu") -> Tensor:
    """Return the margin of every class [K]: 0.5 for the rarest, else smaller by the fourth root of its images."""
    margins = torch.tensor(counts, dtype=torch.float64).clamp(min=1) ** -0.25
    return (LDAM_MARGIN * margins / margins.max()).to(torch.float32).to(device)


def ldam(logits: Tensor, labels: Tensor, margins: Tensor, class_weight: Tensor | None = None,
         world: World | None = None) -> Tensor:
    """Return the label-distribution-aware margin loss; the divisor is the sum of the images' class weights.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019.
    """
    moved = logits - F.one_hot(labels, logits.shape[1]).to(logits.dtype) * margins
    each = cross_entropy_each(LDAM_SCALE * moved, labels)
    if class_weight is None:
        return each.mean()
    weight = class_weight[labels]
    return (each * weight).sum() / distributed.mean(weight.sum(), world or World())


def adjusted(logits: Tensor, cfg: Config, prior: Tensor) -> Tensor:
    """Return logits + TAU log(prior) if ALGORITHM.LOGIT_ADJUST.APPLY, else the logits.

    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10.
    """
    if not cfg.ALGORITHM.LOGIT_ADJUST.APPLY:
        return logits
    return logits + cfg.ALGORITHM.LOGIT_ADJUST.TAU * log_prior(prior)


def log_prior(prior: Tensor) -> Tensor:
    """Return log(prior) [K]; a class without labelled images counts as one image in a million."""
    return prior.clamp(min=1e-6).log()


def labelled_loss(cfg: Config, counts: Sequence[float], world: World | None = None) -> LabelledLoss:
    """Return the loss on labelled images that MODEL.LOSS describes.

    The cost-sensitive kind takes over after WARMUP_ITERS iterations; before that LDAM is plain cross-entropy too.
    """
    loss, world = cfg.MODEL.LOSS, world or World()

    def plain(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        if loss.FOCAL_GAMMA > 0:
            return focal(logits, labels, loss.FOCAL_GAMMA, weight)
        if loss.CROSSENTROPY.USE_SIGMOID:
            return one_vs_all(logits, labels, weight)
        return cross_entropy(logits, labels, None if weight is None else weight[labels])

    if not loss.WITH_LABELED_COST_SENSITIVE:
        return lambda logits, labels, it: plain(logits, labels)
    weight = class_weights(counts, loss.COST_SENSITIVE.BETA, world.device)
    margins = ldam_margins(counts, world.device)

    def sensitive(logits: Tensor, labels: Tensor, it: int) -> Tensor:
        if it + 1 < loss.WARMUP_ITERS:
            return plain(logits, labels)
        if loss.COST_SENSITIVE.LOSS_OVERRIDE == "LDAM":
            return ldam(logits, labels, margins, weight, world)
        return plain(logits, labels, weight)

    return sensitive
