"""ReMixMatch with DASO: its guesses are blended with semantic ones, and the strong view's semantics are aligned.

Oh, Kim and Kweon, "DASO", CVPR 2022 (arXiv 2106.05682), on Berthelot et al., "ReMixMatch", ICLR 2020.
"""
from __future__ import annotations

import torch

from DASO.lib.algorithm.alignment import DistributionAlignment
from DASO.lib.algorithm.daso import alignment_loss
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, consistency_ramp
from DASO.lib.algorithm.mixing import sharpen
from DASO.lib.algorithm.remixmatch import VIEWS, labelled_view, remixmatch_step
from DASO.lib.algorithm.semantics import Semantics
from DASO.lib.config.config import Config


class ReMixMatchDASO(Algorithm):
    state = ("alignment", "semantics")
    logged_pseudo_labels = ("main", "semantic")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.semantics = Semantics(cfg, setting)
        self.alignment = DistributionAlignment(setting.prior, setting) if cfg.MODEL.DIST_ALIGN.APPLY else None

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return VIEWS

    @staticmethod
    def labelled_view(cfg: Config) -> str:
        return labelled_view(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        options, semantics = self.cfg.ALGORITHM.DASO, self.semantics
        with torch.no_grad():
            semantics.push(self.teacher.encoder(batch.labelled), batch.labels)
        features = self.model.encoder(torch.cat(batch.views[:2]))
        (f_weak, f_strong), (weak, strong) = features.chunk(2), self.model.classifier(features).chunk(2)

        target = weak.detach().softmax(1)
        if self.alignment is not None:
            target = self.alignment(target, self.cfg.MODEL.DIST_ALIGN.TEMPERATURE)
        target = sharpen(target, self.cfg.ALGORITHM.REMIXMATCH.TEMPERATURE)
        # As published, the blend follows the predicted shares here, whatever WITH_DIST_AWARE says.
        target, kinds = semantics.blend(target, f_weak.detach(), it, distribution_aware=True)
        losses = {}
        if it >= options.PRETRAIN_STEPS and options.PSA_LOSS_WEIGHT > 0:
            losses["loss_assign"] = options.PSA_LOSS_WEIGHT * alignment_loss(
                semantics.queue, f_strong, semantics.probabilities(f_weak.detach()), options.PROTO_TEMP)

        step = remixmatch_step(self, batch, target, consistency_ramp(self.cfg, it), draws, strong)
        step.losses, step.pseudo_labels = {**losses, **step.losses}, kinds
        return step
