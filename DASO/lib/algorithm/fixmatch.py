"""FixMatch: a confident prediction on the weak view is the label of the strong view; its CReST and ABC forms.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020. With
MODEL.DIST_ALIGN the predictions are aligned to the labelled class distribution, with ALGORITHM.DARP refined.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from DASO.lib.algorithm.crest import SelfTraining
from DASO.lib.algorithm.darp import make_darp
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, Training
from DASO.lib.config.config import Config
from DASO.lib.losses import adjusted, cross_entropy
from shared.distributed import mean
from shared.training.checkpoint import Stateful

WINDOW = 128  # batches in the mean prediction of the distribution alignment, the current one included
EPSILON = 1e-6
EPOCH, EPOCHS = 500, 500  # of ABC's schedule, as published, for any length of the run


class FixMatch(Algorithm):
    state = ("alignment", "darp")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.alignment = make_alignment(cfg, setting, setting.prior)
        self.darp = make_darp(cfg, setting)
        self.prior = setting.prior  # that logits are adjusted by

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        labelled, weak, strong = self.model(batch.images).split(batch.sizes)
        label, mask = self.confident(self.targets(weak.detach().softmax(1), batch, it))
        labelled = adjusted(labelled, self.cfg, self.prior)
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * cross_entropy(strong, label, mask)}
        return Step(losses, labelled, {"main": label}, mask)

    def targets(self, probabilities: Tensor, batch: Batch, it: int) -> Tensor:
        """Return predictions on the weak view [B_u, K], aligned and refined where asked for."""
        if self.alignment is not None:
            probabilities = self.alignment(probabilities, self.exponent(it))
        return probabilities if self.darp is None else self.darp(probabilities, batch.index)

    def exponent(self, it: int) -> float:
        """Return the exponent of the target of the distribution alignment."""
        return self.cfg.MODEL.DIST_ALIGN.TEMPERATURE


class FixMatchCReST(FixMatch):
    """FixMatch in generations: CReST, or CReST+ with MODEL.DIST_ALIGN.APPLY (and, as published, PROGRESSIVE_ALIGN)."""

    state = ("alignment", "darp", "prior")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.self_training = SelfTraining(cfg, setting)
        self.period = self.self_training.period

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        step = super().losses(batch, it, draws)
        step.log |= self.self_training.log(it)
        return step

    def exponent(self, it: int) -> float:
        return self.self_training.exponent(it)

    def after_iteration(self, training: Training, it: int) -> None:
        self.self_training.after_iteration(training, it)
        if (it + 1) % self.period == 0:
            counts = torch.from_numpy(training.batches.counts).to(self.prior)
            self.prior = counts / counts.sum()


class FixMatchABC(Algorithm):
    """FixMatch with an auxiliary balanced classifier on the same features, which is the one that is evaluated."""

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.balanced = BalancedHead(cfg, setting)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        features = self.model.encoder(batch.images)
        labelled, weak, strong = self.model.classifier(features).split(batch.sizes)
        label, mask = self.confident(weak.detach().softmax(1))
        heads = self.model.abc_classifier(features).split(batch.sizes)
        losses = {"loss_abc": self.balanced.loss(*heads, batch.labels, it, draws),
                  "loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * cross_entropy(strong, label, mask)}
        return Step(losses, labelled, {"main": label}, mask)


class BalancedHead:
    """The losses of a second classifier that sees every class equally often.

    Lee, Shin and Kim, "ABC: Auxiliary Balanced Classifier for Class-imbalanced Semi-supervised Learning", NeurIPS 2021
    (arXiv 2110.10368), section 3.2. Labelled images are kept with a probability inverse to their class's frequency; for
    unlabelled ones that probability falls from 1 to it during the training, as pseudo-labels become better.
    """

    def __init__(self, cfg: Config, setting: Setting) -> None:
        self.cfg = cfg
        counts = torch.tensor(setting.labelled_counts, dtype=torch.float32, device=setting.device).clamp(min=1)
        self.inverse = (counts[-1] / counts).clamp(max=1)  # the last class is taken to be the rarest

    def keep_probability(self, it: int) -> Tensor:
        """Return the probability to keep an unlabelled image of each class at iteration `it`, [K]."""
        fraction = it // EPOCH / EPOCHS
        if self.cfg.ALGORITHM.ABC.SCHEDULE == "max_iter":
            fraction = it / self.cfg.SOLVER.MAX_ITER
        return 1 - min(fraction, 1.0) * (1 - self.inverse)

    def loss(self, labelled: Tensor, weak: Tensor, strong: Tensor, labels: Tensor, it: int, draws: Draws,
             blend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the loss [] of the head's logits of labelled images [B_l, K], weak and strong views [B_u, K].

        blend: turns predictions on the weak view [B_u, K] into targets; None: they are the targets.
        """
        mask = draws.bernoulli(self.inverse[labels])
        supervised = cross_entropy(labelled, labels, mask)
        target = weak.detach().softmax(1)
        if blend is not None:
            target = blend(target)
        confidence, label = target.max(1)
        kept = draws.bernoulli(self.keep_probability(it)[label])
        confident = (confidence >= self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD).to(kept.dtype)
        return supervised + cross_entropy(strong, target, kept * confident)


class DistributionAlignment(Stateful):
    """Moves predictions from the recent class distribution towards `target`, float [K].

    Berthelot et al., "ReMixMatch", ICLR 2020 (arXiv 1911.09785), section 3.1. means: the mean prediction of each of the
    last 128 batches, float32 [128, K].
    """

    state = ("means", "calls")

    def __init__(self, target: Tensor, setting: Setting) -> None:
        self.target, self.world = target, setting.world
        self.means = torch.zeros(WINDOW, len(target), device=target.device)
        self.calls = 0

    @torch.no_grad()
    def __call__(self, probabilities: Tensor, exponent: float = 1.0) -> Tensor:
        """Return aligned probabilities [n, K]; the target is raised to `exponent` and normalised first."""
        self.means[self.calls % WINDOW] = mean(probabilities.mean(0), self.world)
        self.calls += 1
        recent = self.means.sum(0) / min(self.calls, WINDOW)
        target = self.target ** exponent
        target = target / target.sum()
        aligned = probabilities * (target + EPSILON) / (recent + EPSILON)
        return aligned / aligned.sum(1, keepdim=True)


def make_alignment(cfg: Config, setting: Setting, target: Tensor) -> DistributionAlignment | None:
    """Return the alignment to `target` [K] if MODEL.DIST_ALIGN.APPLY."""
    return DistributionAlignment(target, setting) if cfg.MODEL.DIST_ALIGN.APPLY else None
