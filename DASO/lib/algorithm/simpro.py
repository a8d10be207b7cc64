"""SimPro: labels and class shares of the unlabelled images by expectation and maximisation, no share being assumed.

Du et al., "SimPro: A Simple Probabilistic Framework Towards Realistic Long-Tailed Semi-Supervised Learning", ICML 2024
(arXiv 2402.13505). The network models p(x | y) up to a factor of x; what is known of p(y) is added to its logits:
the unlabelled shares when it labels, the shares of all training images when it learns, none when it is measured.
Written from the paper as remembered: that the shares start uniform and follow the soft labels with a momentum, and the
weight mu M / N of the labelled loss (mu: unlabelled per labelled images of a batch, M and N: images of each set).
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.fixmatch import fixmatch_views
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import consistency, log_prior


class SimPro(Algorithm):
    """State: `shares` [K], the estimated class shares of the unlabelled images."""

    state = ("shares",)

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.shares = torch.full_like(setting.prior, 1 / setting.num_classes)
        self.labelled_images = sum(setting.labelled_counts)
        self.weight = cfg.ALGORITHM.SIMPRO.LABELED_WEIGHT
        if not self.weight:
            ratio = self.labelled_images / max(setting.num_unlabelled, 1)
            self.weight = min(1.0, cfg.SOLVER.UNLABELED_BATCH_RATIO * ratio)

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return fixmatch_views(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        labelled, weak, strong = self.model(torch.cat([batch.labelled, *batch.views])).split(
            [len(batch.labelled), *map(len, batch.views)])
        # Expectation: the label's distribution, given the image and the unlabelled shares (Bayes' rule).
        target = (weak.detach() + log_prior(self.shares)).softmax(1)
        confidence, label = target.max(1)
        mask = (confidence >= self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD).float()
        # Maximisation over the weights: the images come from both sets together.
        everywhere = log_prior(self.shares_of_all())
        weight = self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT
        losses = {"loss_cls": self.weight * self.labelled_loss(labelled + everywhere, batch.labels, it),
                  "loss_cons": weight * consistency(strong + everywhere, target, mask)}
        # Maximisation over the shares, in closed form: the mean of the labels.
        momentum = self.cfg.ALGORITHM.SIMPRO.MOMENTUM
        self.shares = momentum * self.shares + (1 - momentum) * self.setting.mean(target.mean(0))
        return Step(losses, labelled + everywhere.detach(), {"main": label}, mask)

    def shares_of_all(self) -> Tensor:
        """Return the class shares [K] of labelled and unlabelled images together."""
        known = self.setting.prior * self.labelled_images + self.shares * self.setting.num_unlabelled
        return known / known.sum()
