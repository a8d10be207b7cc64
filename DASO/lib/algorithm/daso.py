"""DASO: pseudo-labels of a linear and of a similarity classifier, blended class by class, and aligned semantics.

Oh, Kim and Kweon, "DASO: Distribution-Aware Semantics-Oriented Pseudo-label for Imbalanced Semi-Supervised Learning",
CVPR 2022 (arXiv 2106.05682), section 3, on FixMatch; with ALGORITHM.ABC.APPLY also for a balanced second classifier.
"""
from __future__ import annotations

import torch
from torch import Tensor

from DASO.lib.algorithm.balanced_head import BalancedHead
from DASO.lib.algorithm.feature_queue import FeatureQueue
from DASO.lib.algorithm.fixmatch import fixmatch_views
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import adjusted, consistency, cross_entropy


class Blender:
    """How much of the semantic pseudo-label goes into which class's pseudo-labels.

    State: `histogram` float32 [K], how often each class was the pseudo-label between the last two refreshes, as shares
    (zeros before the first one); `counts` float32 [K], since the last one.
    """

    def __init__(self, cfg: Config, setting: Setting) -> None:
        self.options, self.setting, self.max_iter = cfg.ALGORITHM.DASO, setting, cfg.SOLVER.MAX_ITER
        self.histogram = torch.zeros(setting.num_classes, device=setting.device)
        self.counts = torch.zeros_like(self.histogram)

    def shares(self) -> Tensor:
        """Return upsilon [K] in 0..1: 1 for the class most often predicted (equation 5); 0 before a histogram exists.
        """
        powered = self.histogram ** (1 / self.options.DIST_TEMP)
        return powered / powered.max().clamp(min=torch.finfo(powered.dtype).tiny)

    def __call__(self, linear: Tensor, semantic: Tensor, distribution_aware: bool = True) -> Tensor:
        """Return pseudo-labels [n, K]: (1 - a) linear + a semantic, a by the linear label's class (equation 4)."""
        if distribution_aware:
            share = self.shares()[linear.argmax(1)][:, None]
        else:
            share = self.options.INTERP_ALPHA
        return (1 - share) * linear + share * semantic

    @torch.no_grad()
    def note(self, labels: Tensor, it: int) -> None:
        """Count this rank's pseudo-labels int64 [n] of iteration `it`, and refresh the histogram when it is time."""
        new = torch.zeros_like(self.counts).scatter_add_(0, labels, torch.ones_like(labels, dtype=torch.float32))
        self.counts = self.counts + self.setting.sum(new)
        if (it + 1) % self.options.PL_DIST_UPDATE_PERIOD == 0 and it + 1 < self.max_iter:
            self.histogram = self.counts / self.counts.sum()
            self.counts = torch.zeros_like(self.counts)

    def state_dict(self) -> dict[str, Tensor]:
        return {"histogram": self.histogram, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.histogram, self.counts = (state[name].to(self.histogram.device) for name in ("histogram", "counts"))


class DASO(Algorithm):
    state = ("queue", "blender")
    logged_pseudo_labels = ("main", "linear", "semantic")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.queue = FeatureQueue(setting.num_classes, cfg.MODEL.QUEUE.MAX_SIZE, setting.feature_size, setting.device)
        self.blender = Blender(cfg, setting)
        self.balanced = BalancedHead(cfg, setting) if cfg.ALGORITHM.ABC.APPLY else None

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return fixmatch_views(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        remember(self, batch)
        features = self.model.encoder(torch.cat([batch.labelled, *batch.views]))
        return self.losses_of(features, batch, it, draws)

    def losses_of(self, features: Tensor, batch: Batch, it: int, draws: Draws) -> Step:
        """Return the losses from the student's features [B_l + 2 B_u, D] of labelled images, weak and strong views."""
        options, loss = self.cfg.ALGORITHM.DASO, self.cfg.MODEL.LOSS
        sizes = [len(batch.labels)] + [(len(features) - len(batch.labels)) // 2] * 2
        _, f_weak, f_strong = features.split(sizes)
        labelled, weak, strong = self.model.classifier(features).split(sizes)
        active, found = it >= options.PRETRAIN_STEPS, {}

        linear = weak.detach().softmax(1)
        target, semantic = linear, None
        if active:
            semantic = (self.queue.similarity(f_weak.detach()) / options.PROTO_TEMP).softmax(1)
            target = self.blender(linear, semantic, options.WITH_DIST_AWARE)
            if options.PSA_LOSS_WEIGHT > 0:  # semantic alignment, equation 7: every image counts
                found["loss_assign"] = options.PSA_LOSS_WEIGHT * alignment_loss(
                    self.queue, f_strong, semantic, options.PROTO_TEMP)
        if self.balanced is not None:
            heads = self.model.abc_classifier(features).split(sizes)
            blended = active and self.cfg.ALGORITHM.ABC.DASO_PSEUDO_LABEL
            blend = (lambda p: self.blender(p, semantic, options.WITH_DIST_AWARE)) if blended else None
            found["loss_abc"] = self.balanced.loss(heads[0], batch.labels, heads[1], heads[2], it, draws, blend)

        confidence, label = target.max(1)
        mask = (confidence >= self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD).float()
        labelled = adjusted(labelled, self.cfg, self.setting.prior)
        found["loss_cls"] = self.labelled_loss(labelled, batch.labels, it)
        found["loss_cons"] = loss.UNLABELED_LOSS_WEIGHT * consistency(strong, label, mask)
        self.blender.note(label, it)
        none = torch.full_like(label, -1)
        kinds = {"main": label, "linear": linear.argmax(1), "semantic": semantic.argmax(1) if active else none}
        return Step(found, None, kinds, mask, confidence=confidence)


def remember(learner: Algorithm, batch: Batch) -> None:
    """Push the teacher's features of the labelled images, of all ranks, to the learner's queue (section 3.2).

    The teacher is in train mode: these images alone are its batch, and move its statistics, as published.
    """
    with torch.no_grad():
        features = learner.teacher.encoder(batch.labelled).float()
    gather = learner.setting.gather
    learner.queue.push(gather(features), gather(batch.labels))


def alignment_loss(queue: FeatureQueue, features: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy [] of the similarity classifier on features [n, D] with targets [n, K]."""
    return cross_entropy(queue.similarity(features) / temperature, target)
