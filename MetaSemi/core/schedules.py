"""What changes over the steps: learning rates and the weight of the unlabelled loss. Plain numbers, no state hidden."""
from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate(step: int, lr: float, warmup: int, gamma: float, milestones: Sequence[int]) -> float:
    """Return the rate of `step` >= 0: rising from 0 to `lr` over `warmup` steps, then times `gamma` behind a milestone.

    The step that equals a milestone still has the rate before it.
    """
    if step < warmup:
        return lr * step / warmup
    return lr * gamma ** sum(step > milestone for milestone in milestones)


def compute_weight(weight: float, step: int, rampup_step: int = 4000) -> float:
    """Return the weight of the unlabelled loss at `step`: rising from 0 to `weight` over `rampup_step` steps."""
    return weight if step >= rampup_step else weight * step / rampup_step


class CosAnnealingLR:
    """The rate of every iteration: a linear rise over `warmup_epochs`, then half a cosine down to 0 (ImageNet).

    loader_len: iterations in an epoch. last_epoch: the last one done, -1 for none. Each call of `step` counts one
    iteration and returns its rate. Beyond `epochs` the cosine rises again.
    """

    def __init__(self, loader_len: int, epochs: int, lr_max: float, warmup_epochs: float, last_epoch: int = -1) -> None:
        self.lr_max = lr_max
        self.warmup, self.total = loader_len * warmup_epochs, loader_len * epochs
        self.count = (last_epoch + 1) * loader_len

    def step(self) -> float:
        self.count += 1
        if self.warmup > 0 and self.count <= self.warmup:
            return self.lr_max * self.count / self.warmup
        share = (self.count - self.warmup) / (self.total - self.warmup)
        return self.lr_max * (1 + math.cos(math.pi * share)) / 2

    def restart(self, lr_max: float | None = None) -> None:
        """Count from the beginning again, with another maximum if one is given."""
        self.lr_max, self.count = self.lr_max if lr_max is None else lr_max, 0
