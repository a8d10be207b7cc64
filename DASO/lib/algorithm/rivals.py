"""Later rivals of DASO, which assume nothing of the unlabelled class distribution: ACR and SimPro.

Both are written from the papers as remembered. ACR: the strengths 2.0 of the adjustments, the start of the estimate
after 5 epochs of 500 iterations, its momentum 0.99, and that the balanced head's confident labels are counted for it.
SimPro: that the distribution starts uniform and follows the soft labels with a momentum, and the weight mu M / N of the
labelled loss (mu: unlabelled per labelled images of a batch, M and N: images of each set).
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import cross_entropy, log_prior
from shared.distributed import all_sum, mean


class ACR(Algorithm):
    """FixMatch with a balanced second head, whose logit adjustment follows the unlabelled class distribution.

    Wei and Gan, "Towards Realistic Long-Tailed Semi-Supervised Learning: Consistency Is All You Need", CVPR 2023. The
    plain head learns the labels as they are, the balanced one, which is evaluated, as if all classes were equally
    frequent. Their pseudo-labels come from the plain head, its logits lowered by tau log(prior). For the plain head tau
    is adapted: the further the unlabelled distribution is from the labelled one, the larger. State: `shares` [K], of
    classes among confident unlabelled images; `distances` [3], summed over an epoch, from the labelled, uniform and
    reversed distributions; `tau` [].
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

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        options, threshold = self.cfg.ALGORITHM.ACR, self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD
        features = self.model.encoder(batch.images)
        labelled, weak, strong = self.model.classifier(features).split(batch.sizes)
        balanced, balanced_weak, balanced_strong = self.model.abc_classifier(features).split(batch.sizes)

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
                  "loss_cons": weight * cross_entropy(strong, label, mask),
                  "loss_cons_balanced": weight * cross_entropy(balanced_strong, other_label, other_mask)}
        return Step(losses, labelled, {"main": other_label}, other_mask, {"acr_tau": self.tau.clone()})

    def follow(self, label: Tensor, confident: Tensor, it: int) -> None:
        """Follow the unlabelled distribution, and once an epoch adapt tau to its distances from the anchors."""
        options = self.cfg.ALGORITHM.ACR
        if it >= options.ESTIMATE_AFTER:
            counts = torch.zeros_like(self.shares).index_add_(0, label, confident.to(self.shares.dtype))
            counts = all_sum(counts, self.setting.world)
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


class SimPro(Algorithm):
    """Labels and unlabelled class distribution by expectation and maximisation.

    Du et al., "SimPro: A Simple Probabilistic Framework Towards Realistic Long-Tailed Semi-Supervised Learning", ICML
    2024 (arXiv 2402.13505). The network models p(x | y) up to a factor of x; log p(y) is added to its
    logits: of the unlabelled images when it labels, of all training images when it learns, none when it is
    evaluated. State: `shares` [K], the estimated unlabelled distribution.
    """

    state = ("shares",)

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.shares = torch.full_like(setting.prior, 1 / setting.num_classes)
        self.labelled_images = sum(setting.labelled_counts)
        self.weight = cfg.ALGORITHM.SIMPRO.LABELED_WEIGHT
        if not self.weight:
            ratio = self.labelled_images / max(setting.num_unlabelled, 1)
            self.weight = min(1.0, cfg.SOLVER.UNLABELED_BATCH_RATIO * ratio)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        labelled, weak, strong = self.model(batch.images).split(batch.sizes)
        # Expectation: the label's distribution, given the image and the unlabelled distribution (Bayes' rule).
        target = (weak.detach() + log_prior(self.shares)).softmax(1)
        label, mask = self.confident(target)
        # Maximisation over the weights: the images come from both sets together.
        everywhere = log_prior(self.shares_of_all())
        weight = self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT
        losses = {"loss_cls": self.weight * self.labelled_loss(labelled + everywhere, batch.labels, it),
                  "loss_cons": weight * cross_entropy(strong + everywhere, target, mask)}
        # Maximisation over the distribution, in closed form: the mean of the labels.
        momentum = self.cfg.ALGORITHM.SIMPRO.MOMENTUM
        self.shares = momentum * self.shares + (1 - momentum) * mean(target.mean(0), self.setting.world)
        return Step(losses, labelled + everywhere.detach(), {"main": label}, mask)

    def shares_of_all(self) -> Tensor:
        """Return the class distribution [K] of labelled and unlabelled images together."""
        known = self.setting.prior * self.labelled_images + self.shares * self.setting.num_unlabelled
        return known / known.sum()
