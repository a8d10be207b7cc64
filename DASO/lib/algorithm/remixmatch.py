"""ReMixMatch: labels guessed from the weak view, aligned and sharpened, learned on strong views; and rotations.

Berthelot et al., "ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring", ICLR
2020 (arXiv 1911.09785). With ALGORITHM.DARP the guesses are refined.
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.alignment import DistributionAlignment
from DASO.lib.algorithm.darp import make_darp
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, consistency_ramp
from DASO.lib.algorithm.mixing import guess, labelled_logits, mix, mixed_losses, sharpen
from DASO.lib.config.config import Config
from DASO.lib.losses import cross_entropy
from shared.augment.views import rotate_quarter_turns

VIEWS = ("weak", "strong_resized", "strong_resized")


class ReMixMatch(Algorithm):
    state = ("alignment", "darp")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.darp = make_darp(cfg, setting) if cfg.ALGORITHM.DARP.APPLY else None
        target = setting.prior
        if self.darp is not None:
            target = (self.darp.target / self.darp.target.sum()).to(target.dtype)
        self.alignment = DistributionAlignment(target, setting) if cfg.MODEL.DIST_ALIGN.APPLY else None

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return VIEWS

    @staticmethod
    def labelled_view(cfg: Config) -> str:
        return labelled_view(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        target = guess(self, batch.views[0])
        if self.alignment is not None:
            target = self.alignment(target, self.cfg.MODEL.DIST_ALIGN.TEMPERATURE)
        target = sharpen(target, self.cfg.ALGORITHM.REMIXMATCH.TEMPERATURE)
        if self.darp is not None:
            target = self.darp(target, batch.index)
        return remixmatch_step(self, batch, target, consistency_ramp(self.cfg, it), draws)


def labelled_view(cfg: Config) -> str:
    """Return the view of labelled images: weak, or strong if REMIXMATCH.LABELED_STRONG_AUG."""
    return "strong_resized" if cfg.ALGORITHM.REMIXMATCH.LABELED_STRONG_AUG else "weak"


def remixmatch_step(learner: Algorithm, batch: Batch, target: Tensor, ramp: float, draws: Draws,
                    strong_logits: Tensor | None = None) -> Step:
    """Return the losses of a batch whose unlabelled images are guessed to be `target` [B_u, K] (equation 6).

    ramp: factor on the losses on guesses. strong_logits: those of the first strong view [B_u, K], where they are
    already known.
    """
    cfg, weights = learner.cfg, learner.cfg.ALGORITHM.REMIXMATCH
    mixed = mix(learner, batch, batch.views, target, weights.MIXUP_ALPHA, draws)
    labelled, unlabelled = mixed_losses(learner, mixed)
    logits = learner.model(batch.views[1]) if strong_logits is None else strong_logits
    losses = {"loss_cls": labelled, "loss_cons": ramp * cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * unlabelled,
              "loss_kl": ramp * weights.WEIGHT_KL * cross_entropy(logits, target)}
    if cfg.MODEL.WITH_ROTATION_HEAD:
        losses["loss_rotation"] = weights.WEIGHT_ROT * rotation_loss(learner, batch.views[1], draws)
    return Step(losses, labelled_logits(learner, mixed), {"main": target.argmax(1)}, log={"cons_rampup_coeff": ramp})


def rotation_loss(learner: Algorithm, images: Tensor, draws: Draws) -> Tensor:
    """Return the cross-entropy of telling by how many quarter turns, as drawn, images [n, C, S, S] are rotated."""
    turns = draws.quarter_turns(len(images))
    logits = learner.model.projection(learner.model.encoder(rotate_quarter_turns(images, turns)))
    return cross_entropy(logits, torch.from_numpy(turns).to(logits.device))
