"""FixMatch: a confident prediction on the weak view is the label of the strong view.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020. With
MODEL.DIST_ALIGN the predictions are aligned to the labelled class shares, with ALGORITHM.DARP they are refined.
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.alignment import DistributionAlignment
from DASO.lib.algorithm.darp import make_darp
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import adjusted, consistency


def fixmatch_views(cfg: Config) -> tuple[str, ...]:
    """Return the weak view and a second one, strong if DATASET.TRANSFORM.STRONG_AUG."""
    return ("weak", "strong" if cfg.DATASET.TRANSFORM.STRONG_AUG else "weak")


class FixMatch(Algorithm):
    state = ("alignment", "darp")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.alignment = DistributionAlignment(setting.prior, setting) if cfg.MODEL.DIST_ALIGN.APPLY else None
        self.darp = make_darp(cfg, setting) if cfg.ALGORITHM.DARP.APPLY else None

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return fixmatch_views(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        labelled, weak, strong = self.model(torch.cat([batch.labelled, *batch.views])).split(
            [len(batch.labelled), *map(len, batch.views)])
        confidence, label = self.targets(weak.detach().softmax(1), batch, it).max(1)
        mask = (confidence >= self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD).float()
        labelled = adjusted(labelled, self.cfg, self.prior())
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * consistency(strong, label, mask)}
        return Step(losses, labelled, {"main": label}, mask, confidence=confidence)

    def targets(self, probabilities: Tensor, batch: Batch, it: int) -> Tensor:
        """Return predictions on the weak view [B_u, K], aligned and refined where asked for."""
        if self.alignment is not None:
            probabilities = self.alignment(probabilities, self.cfg.MODEL.DIST_ALIGN.TEMPERATURE)
        if self.darp is not None:
            probabilities = self.darp(probabilities, batch.index)
        return probabilities

    def prior(self) -> Tensor:
        """Return the class shares [K] that logits are adjusted by."""
        return self.setting.prior
