"""FixMatch with an auxiliary balanced classifier (ABC): a second head that learns every class equally often.

Lee et al., "ABC: Auxiliary Balanced Classifier for Class-imbalanced Semi-supervised Learning", NeurIPS 2021 (arXiv
2110.10368). Both heads share the features; the balanced one is measured.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from DASO.lib.algorithm.fixmatch import fixmatch_views
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import consistency, cross_entropy_each

EPOCHS, EPOCH_LENGTH = 500, 500  # over which unlabelled images become as balanced as labelled ones


class FixMatchABC(Algorithm):
    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return fixmatch_views(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        threshold = self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD
        features = self.model.encoder(torch.cat([batch.labelled, *batch.views]))
        sizes = [len(batch.labelled), *map(len, batch.views)]
        labelled, weak, strong = self.model.classifier(features).split(sizes)
        confidence, label = weak.detach().softmax(1).max(1)
        mask = (confidence >= threshold).float()

        balanced, balanced_weak, balanced_strong = self.model.abc_classifier(features).split(sizes)
        target = balanced_weak.detach().softmax(1)
        losses = {"loss_abc": balanced_loss(self, balanced, batch.labels, target, balanced_strong, it, draws),
                  "loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * consistency(strong, label, mask)}
        return Step(losses, labelled, {"main": label}, mask)


def balanced_loss(learner: Algorithm, labelled: Tensor, labels: Tensor, target: Tensor, strong: Tensor, it: int,
                  draws: Draws) -> Tensor:
    """Return the loss of the balanced head on labelled images and on strong views whose labels are `target` [B_u, K].

    labelled [B_l, K], strong [B_u, K]: its logits. Images are left out by chance, the more the more frequent their
    class (equations 1 and 3 of the paper).
    """
    rates = keep_rates(learner.setting.labelled_counts, labels.device)
    kept = draws.bernoulli(rates[labels])
    loss = (kept * cross_entropy_each(labelled, labels)).mean()
    confidence, label = target.max(1)
    kept = draws.bernoulli((1 - progress(learner.cfg, it) * (1 - rates))[label])
    kept = kept * (confidence >= learner.cfg.ALGORITHM.CONFIDENCE_THRESHOLD)
    return loss + (kept * cross_entropy_each(strong, target)).mean()


def keep_rates(counts: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the probability [K] of keeping an image: the labelled images of the last class over those of its own.

    The last class is taken to be the rarest, as published.
    """
    counts = torch.tensor(counts, dtype=torch.float32, device=device).clamp(min=1)
    return counts[-1] / counts


def progress(cfg: Config, it: int) -> float:
    """Return how far the balancing of unlabelled images is: from 0 to 1 over 500 published epochs of 500 iterations.

    With ALGORITHM.ABC.SCHEDULE max_iter, over 500 equal parts of the run.
    """
    length = EPOCHS * EPOCH_LENGTH if cfg.ALGORITHM.ABC.SCHEDULE == "published" else cfg.SOLVER.MAX_ITER
    return (it * EPOCHS // length) / EPOCHS
