"""A second classifier on the same features that sees every class equally often (ABC).

Lee, Shin and Kim, "ABC: Auxiliary Balanced Classifier for Class-imbalanced Semi-supervised Learning", NeurIPS 2021
(arXiv 2110.10368), section 3.2.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from DASO.lib.algorithm.interface import Draws, Setting
from DASO.lib.config.config import Config
from DASO.lib.losses import consistency, cross_entropy

EPOCH, EPOCHS = 500, 500  # as published, whatever the length of the run


class BalancedHead:
    """Its losses. Labelled images are kept with a probability inverse to their class's frequency; for unlabelled ones
    that probability falls from 1 to it during the training, as pseudo-labels become better.
    """

    def __init__(self, cfg: Config, setting: Setting) -> None:
        self.cfg = cfg
        counts = torch.tensor(setting.labelled_counts, dtype=torch.float32, device=setting.device).clamp(min=1)
        self.inverse = (counts[-1] / counts).clamp(max=1)  # the last class is taken to be the rarest

    def keep_probability(self, it: int) -> Tensor:
        """Return with which probability an unlabelled image of each class is kept at iteration `it`, [K]."""
        share = it // EPOCH / EPOCHS
        if self.cfg.ALGORITHM.ABC.SCHEDULE == "max_iter":
            share = it / self.cfg.SOLVER.MAX_ITER
        return 1 - min(share, 1.0) * (1 - self.inverse)

    def loss(self, labelled: Tensor, labels: Tensor, weak: Tensor, strong: Tensor, it: int, draws: Draws,
             blend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the loss [] of the head's logits [B_l, K] and [B_u, K] twice.

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
        return supervised + consistency(strong, target, kept * confident)
