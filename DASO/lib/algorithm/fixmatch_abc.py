"""FixMatch with an auxiliary balanced classifier (ABC): a second head that learns every class equally often.

Lee, Shin and Kim, "ABC: Auxiliary Balanced Classifier for Class-imbalanced Semi-supervised Learning", NeurIPS 2021
(arXiv 2110.10368). Both heads share the features; the balanced one is measured.
"""
from __future__ import annotations

import torch

from DASO.lib.algorithm.balanced_head import BalancedHead
from DASO.lib.algorithm.fixmatch import fixmatch_views
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import consistency


class FixMatchABC(Algorithm):
    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.balanced = BalancedHead(cfg, setting)

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return fixmatch_views(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        features = self.model.encoder(torch.cat([batch.labelled, *batch.views]))
        sizes = [len(batch.labelled), *map(len, batch.views)]
        labelled, weak, strong = self.model.classifier(features).split(sizes)
        confidence, label = weak.detach().softmax(1).max(1)
        mask = (confidence >= self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD).float()
        heads = self.model.abc_classifier(features).split(sizes)
        losses = {"loss_abc": self.balanced.loss(heads[0], batch.labels, heads[1], heads[2], it, draws),
                  "loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * consistency(strong, label, mask)}
        return Step(losses, labelled, {"main": label}, mask)
