"""PseudoLabel: the confident prediction on a view is the label of that same view.

Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", 2013.
"""
from __future__ import annotations

import torch

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Step, consistency_ramp
from DASO.lib.config.config import Config
from DASO.lib.losses import consistency


class PseudoLabel(Algorithm):
    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return ("weak",)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        labelled, weak = self.model(torch.cat([batch.labelled, *batch.views])).split(
            [len(batch.labelled), len(batch.views[0])])
        confidence, label = weak.detach().softmax(1).max(1)
        mask = (confidence >= self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD).float()
        ramp = consistency_ramp(self.cfg, it)
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": ramp * self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * consistency(weak, label, mask)}
        return Step(losses, labelled, {"main": label}, mask, {"cons_rampup_coeff": ramp})
