"""ACR: FixMatch with a balanced second head, whose logit adjustment follows the unlabelled class shares.

Wei and Gan, "Towards Realistic Long-Tailed Semi-Supervised Learning: Consistency Is All You Need", CVPR 2023. Written
from the paper as remembered: the strengths 2.0 of the adjustments, the start of the estimate after 5 epochs of 500
iterations, its momentum 0.99, and that the balanced head's confident labels are counted for it.
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.fixmatch import fixmatch_views
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import consistency, cross_entropy, log_prior


class ACR(Algorithm):
    """Both heads see the same features; the balanced one is measured.

    The plain head learns the labels as they are, the balanced one as if all classes were equally frequent. Their
    pseudo-labels come from the plain head, its logits lowered by tau log(prior). For the plain head tau is adapted: the
    further the unlabelled shares are from the labelled ones, the larger. State: `shares` [K], of classes among
    confident unlabelled images; `distances` [3], summed over an epoch, from the labelled, uniform and reversed shares;
    `tau` [].
    """

    state = ("shares", "distances", "tau")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.log_prior = log_prior(setting.prior)
        prior = self.log_prior.softmax(0)
        self.shares = torch.full_like(prior, 1 / len(prior))
        self.anchors = torch.stack([prior, self.shares, prior.sort().values[prior.argsort(descending=True).argsort()]])
        self.distances = torch.zeros(len(self.anchors), device=prior.device)
        self.tau = torch.tensor(cfg.ALGORITHM.ACR.TAU, device=prior.device)

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return fixmatch_views(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        options, threshold = self.cfg.ALGORITHM.ACR, self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD
        features = self.model.encoder(torch.cat([batch.labelled, *batch.views]))
        sizes = [len(batch.labelled), *map(len, batch.views)]
        labelled, weak, strong = self.model.classifier(features).split(sizes)
        balanced, balanced_weak, balanced_strong = self.model.abc_classifier(features).split(sizes)

        weak = weak.detach()
        plain = weak.softmax(1).amax(1)
        confidence, label = (weak - self.tau * self.log_prior).softmax(1).max(1)
        other_confidence, other_label = (weak - options.TAU_BALANCED_LABELS * self.log_prior).softmax(1).max(1)
        balanced_confidence, balanced_label = balanced_weak.detach().softmax(1).max(1)
        mask = ((confidence >= threshold) | (plain >= threshold)).float()
        other_mask = ((other_confidence >= threshold) | (balanced_confidence >= threshold)).float()
        self.follow(balanced_label, balanced_confidence >= threshold, it)

        weight = self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cls_balanced": cross_entropy(balanced + options.TAU_BALANCED * self.log_prior, batch.labels),
                  "loss_cons": weight * consistency(strong, label, mask),
                  "loss_cons_balanced": weight * consistency(balanced_strong, other_label, other_mask)}
        return Step(losses, labelled, {"main": other_label}, other_mask, {"acr_tau": self.tau.clone()})

    def follow(self, label: Tensor, confident: Tensor, it: int) -> None:
        """Follow the unlabelled shares, and once an epoch adapt tau to how far they are from the anchors."""
        options = self.cfg.ALGORITHM.ACR
        if it >= options.ESTIMATE_AFTER:
            counts = torch.zeros_like(self.shares).index_add_(0, label, confident.to(self.shares.dtype))
            counts = self.setting.sum(counts)
            moved = options.MOMENTUM * self.shares + (1 - options.MOMENTUM) * counts / counts.sum().clamp(min=1)
            self.shares = torch.where(counts.sum() > 0, moved, self.shares)
            self.distances = self.distances + two_way_divergence(self.anchors, self.shares)
        if (it + 1) % options.EPOCH == 0:
            if it >= options.ESTIMATE_AFTER:
                self.tau = options.TAU * (self.distances / options.EPOCH).softmax(0)[0]
            self.distances = torch.zeros_like(self.distances)


def two_way_divergence(anchors: Tensor, shares: Tensor) -> Tensor:
    """Return the mean of both Kullback-Leibler divergences between each of the anchors [A, K] and shares [K]: [A]."""
    return 0.5 * ((anchors - shares) * (anchors.log() - shares.log())).sum(1)
