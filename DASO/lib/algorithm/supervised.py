"""Supervised: cross-entropy of the labelled images alone, by itself or with one of the losses for unequal classes.

MODEL.LOSS.* choose class-balanced weights or LDAM after a warm-up, one-vs-all and focal losses;
ALGORITHM.LOGIT_ADJUST adjusts the logits (Menon et al., ICLR 2021); DATASET.SAMPLER_NAME re-samples.
"""
from __future__ import annotations

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Step
from DASO.lib.losses import adjusted


class Supervised(Algorithm):
    """Evaluates the trained network; there is no moving average."""

    keeps_average = False
    evaluates_average = False

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        logits = adjusted(self.model(batch.labelled), self.cfg, self.setting.prior)
        return Step({"loss_cls": self.labelled_loss(logits, batch.labels, it)}, logits)
