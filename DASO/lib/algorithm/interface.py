"""The interface of a learner: its views, its losses on a batch and its state; hooks for special learners."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from DASO.lib.config.config import Config
from DASO.lib.data.batches import Batch, Batches, ViewedPool
from DASO.lib.losses import labelled_loss
from DASO.lib.models.semi import SemiModel
from shared.distributed import World
from shared.training.checkpoint import Stateful
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng
from shared.training.run import Run


@dataclass
class Step:
    """The results of a learner on a batch.

    losses: name -> loss [], in published order; their sum is descended. logits: float [B_l, K] of the labelled images,
    for the training accuracy. pseudo_labels: kind ("main", "linear", "semantic") -> int64 [B_u], -1 for none. mask:
    [B_u], 1 where the pseudo-label was learned. log: further numbers by name.
    """

    losses: dict[str, Tensor]
    logits: Tensor | None = None
    pseudo_labels: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    log: dict[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """The data and the ranks of a run.

    labelled_counts: images of every class in the initial labelled set. feature_size: D, of the encoder's output.
    """

    num_classes: int
    labelled_counts: tuple[int, ...]
    num_unlabelled: int = 0
    feature_size: int = 128
    world: World = World()

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def prior(self) -> Tensor:
        """The class distribution of the initial labelled images, float32 [K]."""
        counts = to_device(torch.tensor(self.labelled_counts, dtype=torch.float32), self.device)
        return counts / counts.sum()


class Draws:
    """The random numbers of one iteration: functions of (seed, iteration, number of the call) alone."""

    def __init__(self, seed: int, iteration: int, world: World | None = None) -> None:
        self.seed, self.iteration, self.world, self.calls = seed, iteration, world or World(), 0

    def _rng(self, kind: str) -> np.random.Generator:
        self.calls += 1
        return numpy_rng(self.seed, self.iteration, f"{kind} {self.calls}")

    def bernoulli(self, probability: Tensor) -> Tensor:
        """Return 0 or 1, float [n], with this rank's `probability` [n] of 1 each."""
        numbers = self._rng("bernoulli").random(len(probability) * self.world.size, np.float32)
        part = to_device(numbers[self.world.slice(len(numbers))], probability.device)
        return (part < probability).to(probability.dtype)

    def beta(self, alpha: float) -> float:
        """Return a number from Beta(alpha, alpha)."""
        return float(self._rng("beta").beta(alpha, alpha))

    def permutation(self, count: int) -> np.ndarray:
        """Return a permutation of the `count` images of the global batch, int64 [count]."""
        return self._rng("permutation").permutation(count)

    def quarter_turns(self, count: int) -> np.ndarray:
        """Return 0..3 for this rank's `count` images, int64 [count]."""
        turns = self._rng("turns").integers(4, size=count * self.world.size)
        return turns[self.world.slice(len(turns))]


class Training(Protocol):
    """The trainer as the hooks of a learner see it; valid: the held-out images."""

    folder: Path
    run: Run
    batches: Batches
    valid: ViewedPool | None

    def predict(self, pool: ViewedPool) -> Tensor:
        """Return the evaluated network's logits [N, K] of all images in order."""

    def restart(self, generation: int) -> None:
        """Begin again with untrained weights, a new average, optimiser and schedule."""


class Algorithm(Stateful):
    """A learner.

    model, teacher: the trained network, and the moving average of its weights if `keeps_average`; the trainer sets
    both. Both are in train mode: images that run through the teacher move its batch statistics, as published.

    views: of each unlabelled image: "eval", "weak", "strong" (RandAugment before the resize to DATASET.RESOLUTION),
    "strong_resized" (after it), or "second": strong if DATASET.TRANSFORM.STRONG_AUG, else weak.
    state: see Stateful; it is that of the global batch, equal on all ranks.
    period: iterations after which weights, average, learning rate and ramp-up begin again; None: never.
    """

    views: tuple[str, ...] = ("weak", "second")
    labelled_view = "weak"
    keeps_average = True
    evaluates_average = True  # whether the average is evaluated, or the trained network
    period: int | None = None
    logged_pseudo_labels: tuple[str, ...] = ()  # kinds whose statistics the published log holds
    model: SemiModel
    teacher: SemiModel | None

    def __init__(self, cfg: Config, setting: Setting) -> None:
        self.cfg, self.setting = cfg, setting
        self.labelled_loss = labelled_loss(cfg, setting.labelled_counts, setting.world)
        second = "strong" if cfg.DATASET.TRANSFORM.STRONG_AUG else "weak"
        self.views = tuple(second if view == "second" else view for view in self.views)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        """Return the losses of iteration `it` (from 0) on a batch; called in train mode."""
        raise NotImplementedError

    def confident(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest class int64 [n] of [n, K], and 1.0 [n] if it reaches ALGORITHM.CONFIDENCE_THRESHOLD."""
        confidence, label = probabilities.max(1)
        return label, (confidence >= self.cfg.ALGORITHM.CONFIDENCE_THRESHOLD).float()

    def since_start(self, it: int) -> int:
        """Return the number of iterations before `it` since the weights were untrained."""
        return it if self.period is None else it % self.period

    def ramp_up(self, it: int) -> float:
        """Return the factor on the consistency losses of iteration `it`."""
        options, total = self.cfg.ALGORITHM, self.period or self.cfg.SOLVER.MAX_ITER
        return ramp_up(self.since_start(it), total, options.CONS_RAMPUP_ITERS_RATIO, options.CONS_RAMPUP_SCHEDULE)

    def begin(self, training: Training) -> None:
        """Called before the first iteration, and before a checkpoint is loaded."""

    def evaluated(self, training: Training, it: int) -> None:
        """Called after every evaluation; the last iteration ends with one."""

    def after_iteration(self, training: Training, it: int) -> None:
        """Called at the end of an iteration, after evaluation and log."""


def ramp_up(it: int, total: int, ratio: float, schedule: str) -> float:
    """Return a factor that reaches 1 after `ratio` of `total` iterations.

    schedule: "linear", or "exp" for exp(-5 (1 - fraction)^2).
    """
    length = total * ratio
    fraction = min(it / length, 1.0) if length > 0 else 1.0
    return fraction if schedule == "linear" else float(np.exp(-5 * (1 - fraction) ** 2))
