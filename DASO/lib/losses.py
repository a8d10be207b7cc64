"""Losses: on labelled images with unequal classes, on unlabelled ones with targets of their own."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.config.config import Config
from shared.distributed import World, mean

LabelledLoss = Callable[[Tensor, Tensor, int], Tensor]  # logits [n, K], labels int64 [n], iteration -> loss []
LDAM_MARGIN, LDAM_SCALE = 0.5, 30.0


def weighted_mean(each: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean of losses [n] times `weight` [n]; the divisor is n, not the sum of weights, as published."""
    return each.mean() if weight is None else (each * weight).mean()


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean over all n images of the cross-entropy times `weight` [n].

    target: classes int64 [n] or probabilities [n, K].
    """
    return weighted_mean(F.cross_entropy(logits, target, reduction="none"), weight)


def one_vs_all(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the binary cross-entropy of every class against the others, mean over images and classes."""
    each = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype),
                                              reduction="none").mean(1)
    return weighted_mean(each, weight)


def focal(logits: Tensor, labels: Tensor, gamma: float, weight: Tensor | None = None) -> Tensor:
    """Return the mean of (1 - p)^gamma times the cross-entropy, p the label's probability.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4, with softmax probabilities.
    """
    each = F.cross_entropy(logits, labels, reduction="none")
    return weighted_mean((1 - torch.exp(-each)).clamp(min=0) ** gamma * each, weight)


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


def ldam(logits: Tensor, labels: Tensor, margins: Tensor, weight: Tensor | None = None,
         world: World | None = None) -> Tensor:
    """Return the label-distribution-aware margin loss of images with `weight` [n]; the divisor is the sum of weights.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019.
    """
    moved = logits - F.one_hot(labels, logits.shape[1]).to(logits.dtype) * margins
    each = F.cross_entropy(LDAM_SCALE * moved, labels, reduction="none")
    if weight is None:
        return each.mean()
    return (each * weight).sum() / mean(weight.sum(), world or World())


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
    options, world = cfg.MODEL.LOSS, world or World()
    weights = class_weights(counts, options.COST_SENSITIVE.BETA, world.device)
    margins = ldam_margins(counts, world.device)

    def loss(logits: Tensor, labels: Tensor, it: int) -> Tensor:
        sensitive = options.WITH_LABELED_COST_SENSITIVE and it + 1 >= options.WARMUP_ITERS
        weight = weights[labels] if sensitive else None
        if sensitive and options.COST_SENSITIVE.LOSS_OVERRIDE == "LDAM":
            return ldam(logits, labels, margins, weight, world)
        if options.FOCAL_GAMMA > 0:
            return focal(logits, labels, options.FOCAL_GAMMA, weight)
        if options.CROSSENTROPY.USE_SIGMOID:
            return one_vs_all(logits, labels, weight)
        return cross_entropy(logits, labels, weight)

    return loss
