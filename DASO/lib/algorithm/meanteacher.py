"""MeanTeacher: the student learns the averaged network's probabilities of another view.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017 (arXiv 1703.01780). With
ALGORITHM.MEANTEACHER.APPLY_DASO the teacher's probabilities are blended with the semantic ones of DASO.
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.fixmatch import fixmatch_views
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, consistency_ramp
from DASO.lib.algorithm.semantics import Semantics
from DASO.lib.config.config import Config
from DASO.lib.losses import squared_difference


class MeanTeacher(Algorithm):
    state = ("semantics",)

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.semantics = Semantics(cfg, setting) if cfg.ALGORITHM.MEANTEACHER.APPLY_DASO else None

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return fixmatch_views(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        first, second = batch.views
        labelled, student = self.model(torch.cat([batch.labelled, first])).split([len(batch.labelled), len(first)])
        target, kinds = self.teach(batch, second, it)
        ramp = consistency_ramp(self.cfg, it)
        consistency = squared_difference(student.softmax(1), target)
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": ramp * self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * consistency}
        return Step(losses, labelled, kinds, log={"cons_rampup_coeff": ramp})

    @torch.no_grad()
    def teach(self, batch: Batch, images: Tensor, it: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the target probabilities [B_u, K] of images, and the pseudo-labels behind them."""
        if self.semantics is None:
            return self.teacher(images).softmax(1), {}
        features = self.teacher.encoder(torch.cat([batch.labelled, images]))
        labelled, unlabelled = features.split([len(batch.labelled), len(images)])
        self.semantics.push(labelled, batch.labels)
        return self.semantics.blend(self.teacher.classifier(unlabelled).softmax(1), unlabelled, it)
