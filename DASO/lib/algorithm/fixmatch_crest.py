"""FixMatch in generations: CReST, or CReST+ with MODEL.DIST_ALIGN.APPLY (and, as published, PROGRESSIVE_ALIGN)."""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.alignment import DistributionAlignment
from DASO.lib.algorithm.darp import make_darp
from DASO.lib.algorithm.fixmatch import fixmatch_views
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, Training
from DASO.lib.algorithm.self_training import SelfTraining
from DASO.lib.config.config import Config
from DASO.lib.losses import adjusted, consistency


class FixMatchCReST(Algorithm):
    state = ("alignment", "darp", "prior")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.self_training = SelfTraining(cfg, setting)
        self.alignment = DistributionAlignment(setting.prior, setting) if cfg.MODEL.DIST_ALIGN.APPLY else None
        self.darp = make_darp(cfg, setting) if cfg.ALGORITHM.DARP.APPLY else None
        self.prior = setting.prior  # of the labelled set as it has become

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return fixmatch_views(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        labelled, weak, strong = self.model(torch.cat([batch.labelled, *batch.views])).split(
            [len(batch.labelled), *map(len, batch.views)])
        confidence, label = self.targets(weak.detach().softmax(1), batch, it).max(1)
        mask = (confidence >= self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD).float()
        labelled = adjusted(labelled, self.cfg, self.prior)
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * consistency(strong, label, mask)}
        return Step(losses, labelled, {"main": label}, mask, self.self_training.log(it))

    def targets(self, probabilities: Tensor, batch: Batch, it: int) -> Tensor:
        """Return predictions on the weak view [B_u, K], aligned and refined where asked for."""
        if self.alignment is not None:
            probabilities = self.alignment(probabilities, self.self_training.exponent(it))
        return probabilities if self.darp is None else self.darp(probabilities, batch.index)

    def ema_step(self, it: int) -> int:
        return it % self.self_training.period

    def begin(self, training: Training) -> None:
        self.self_training.begin(training)

    def after_iteration(self, training: Training, it: int) -> None:
        self.self_training.after_iteration(training, it)
        if (it + 1) % self.self_training.period == 0:
            counts = torch.from_numpy(training.batches.counts).to(self.prior)
            self.prior = counts / counts.sum()
