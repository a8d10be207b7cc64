"""ReMixMatch: labels guessed from the weak view, aligned and sharpened, learned on strong views; and rotations.

Berthelot et al., "ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring", ICLR
2020 (arXiv 1911.09785). With ALGORITHM.DARP the guesses are refined. Its CReST and DASO forms.
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.crest import SelfTraining
from DASO.lib.algorithm.darp import make_darp
from DASO.lib.algorithm.daso import Semantics
from DASO.lib.algorithm.fixmatch import make_alignment
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, Training
from DASO.lib.algorithm.mixmatch import labelled_logits, mix, mixed_losses, sharpen
from DASO.lib.config.config import Config
from DASO.lib.losses import cross_entropy
from shared.augment.views import rotate_quarter_turns
from shared.training.precision import to_device


class ReMixMatch(Algorithm):
    views = ("weak", "strong_resized", "strong_resized")
    state = ("alignment", "darp")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        if cfg.ALGORITHM.REMIXMATCH.LABELED_STRONG_AUG:
            self.labelled_view = "strong_resized"
        self.darp = make_darp(cfg, setting)
        target = setting.prior
        if self.darp is not None:
            target = (self.darp.target / self.darp.target.sum()).to(target.dtype)
        self.alignment = make_alignment(cfg, setting, target)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        with torch.no_grad():  # a forward pass of its own, which moves the batch statistics
            target = self.guess(self.model(batch.views[0]), it)
        if self.darp is not None:
            target = self.darp(target, batch.index)
        return self.losses_on(target, batch, it, draws)

    def guess(self, logits: Tensor, it: int) -> Tensor:
        """Return the probabilities [n, K] of logits, aligned where asked for, and sharpened."""
        probabilities = logits.softmax(1)
        if self.alignment is not None:
            probabilities = self.alignment(probabilities, self.exponent(it))
        return sharpen(probabilities, self.cfg.ALGORITHM.REMIXMATCH.TEMPERATURE)

    def exponent(self, it: int) -> float:
        """Return the exponent of the target of the distribution alignment."""
        return self.cfg.MODEL.DIST_ALIGN.TEMPERATURE

    def losses_on(self, target: Tensor, batch: Batch, it: int, draws: Draws, strong: Tensor | None = None) -> Step:
        """Return the losses of a batch whose unlabelled images are guessed to be `target` [B_u, K] (equation 6).

        strong: logits of the first strong view [B_u, K], if they are already known.
        """
        weights, ramp = self.cfg.ALGORITHM.REMIXMATCH, self.ramp_up(it)
        mixed = mix(self, batch, target, weights.MIXUP_ALPHA, draws)
        labelled, unlabelled = mixed_losses(self, mixed)
        strong = self.model(batch.views[1]) if strong is None else strong
        losses = {"loss_cls": labelled, "loss_cons": ramp * self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * unlabelled,
                  "loss_kl": ramp * weights.WEIGHT_KL * cross_entropy(strong, target)}
        if self.cfg.MODEL.WITH_ROTATION_HEAD:
            losses["loss_rotation"] = weights.WEIGHT_ROT * self.rotation_loss(batch.views[1], draws)
        return Step(losses, labelled_logits(self, mixed), {"main": target.argmax(1)}, log={"cons_rampup_coeff": ramp})

    def rotation_loss(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the cross-entropy of telling by how many quarter turns, as drawn, images [n, C, S, S] are rotated."""
        turns = draws.quarter_turns(len(images))
        logits = self.model.projection(self.model.encoder(rotate_quarter_turns(images, turns)))
        return cross_entropy(logits, to_device(turns, logits.device))


class ReMixMatchCReST(ReMixMatch):
    """ReMixMatch in generations: CReST, or CReST+ with MODEL.DIST_ALIGN.APPLY (as published, PROGRESSIVE_ALIGN)."""

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.self_training = SelfTraining(cfg, setting)
        self.period = self.self_training.period
        self.alignment = make_alignment(cfg, setting, setting.prior)  # also with DARP

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        step = super().losses(batch, it, draws)
        step.log |= self.self_training.log(it)
        return step

    def exponent(self, it: int) -> float:
        return self.self_training.exponent(it)

    def after_iteration(self, training: Training, it: int) -> None:
        self.self_training.after_iteration(training, it)


class ReMixMatchDASO(ReMixMatch):
    """ReMixMatch whose guesses are blended with semantic ones, and whose strong view's semantics are aligned."""

    state = ("alignment", "semantics")
    logged_pseudo_labels = ("main", "semantic")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.alignment = make_alignment(cfg, setting, setting.prior)
        self.semantics = Semantics(cfg, setting, by_class=True)  # with or without WITH_DIST_AWARE, as published

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        with torch.no_grad():
            self.semantics.push(self.teacher.encoder(batch.labelled), batch.labels)
        features = self.model.encoder(torch.cat(batch.views[:2]))
        (weak_features, strong_features), (weak, strong) = features.chunk(2), self.model.classifier(features).chunk(2)
        guessed, losses = self.guess(weak.detach(), it), {}
        target, semantic = self.semantics.blend(guessed, weak_features.detach(), it)
        if semantic is not None and self.cfg.ALGORITHM.DASO.PSA_LOSS_WEIGHT > 0:
            losses["loss_assign"] = self.semantics.alignment_loss(strong_features, semantic)
        step = self.losses_on(target, batch, it, draws, strong)
        step.losses = {**losses, **step.losses}
        step.pseudo_labels = self.semantics.count(guessed, semantic, target, it)
        return step
