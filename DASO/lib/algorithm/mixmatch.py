"""MixMatch: labels guessed from two views and sharpened; labelled and unlabelled images mixed with each other.

Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019 (arXiv 1905.02249). With
ALGORITHM.MIXMATCH.APPLY_DASO the guesses are blended with the semantic ones of DASO.
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, consistency_ramp
from DASO.lib.algorithm.mixing import labelled_logits, mix, mixed_losses, sharpen
from DASO.lib.algorithm.semantics import Semantics
from DASO.lib.config.config import Config


class MixMatch(Algorithm):
    state = ("semantics",)

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.semantics = Semantics(cfg, setting) if cfg.ALGORITHM.MIXMATCH.APPLY_DASO else None

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return ("weak", "weak")

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        target, kinds = self.guess(batch, it)
        mixed = mix(self, batch, batch.views, target, self.cfg.ALGORITHM.MIXMATCH.MIXUP_ALPHA, draws)
        labelled, unlabelled = mixed_losses(self, mixed)
        ramp = consistency_ramp(self.cfg, it)
        losses = {"loss_cls": labelled, "loss_cons": ramp * self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * unlabelled}
        return Step(losses, labelled_logits(self, mixed), kinds, log={"cons_rampup_coeff": ramp})

    @torch.no_grad()
    def guess(self, batch: Batch, it: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the guessed probabilities [B_u, K] of the unlabelled images, and the pseudo-labels behind them."""
        if self.semantics is not None:
            self.semantics.push(self.teacher.encoder(batch.labelled), batch.labels)
        features = [self.model.encoder(view) for view in batch.views]
        first, second = (self.model.classifier(part).softmax(1) for part in features)
        target = sharpen((first + second) / 2, self.cfg.ALGORITHM.MIXMATCH.TEMPERATURE)
        return (target, {}) if self.semantics is None else self.semantics.blend(target, features[0], it)
