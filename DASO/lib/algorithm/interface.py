"""What a learner is: the views it wants, its losses on a batch, its state, and a few hooks for the rarer ones."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from DASO.lib.data.batches import Batch, Batches, ViewedPool
from DASO.lib.losses import LabelledLoss, labelled_loss
from shared import distributed
from shared.distributed import World
from shared.training.randomness import numpy_rng

if TYPE_CHECKING:
    from DASO.lib.config.config import Config
    from DASO.lib.models.semi import SemiModel
    from DASO.lib.solver import Scheduler
    from shared.training.run import Run


@dataclass
class Step:
    """What a learner returns for a batch.

    losses: name -> loss [], in published order; the sum is descended. logits: float [B_l, K], of the labelled images,
    for the training accuracy (None: not logged). pseudo_labels: kind ("main", "linear", "semantic") -> int64 [B_u], -1
    where there is none; recall and precision are logged of them. mask: [B_u], 1 where the pseudo-label was learned.
    log: further numbers, name -> value. confidence: [B_u], of the main pseudo-label.
    """

    losses: dict[str, Tensor]
    logits: Tensor | None = None
    pseudo_labels: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    log: dict[str, Tensor | float] = field(default_factory=dict)
    confidence: Tensor | None = None


@dataclass(frozen=True)
class Setting:
    """What a learner may know besides its configuration. Reductions make its state that of the global batch.

    labelled_counts: images of every class in the initial labelled set. num_unlabelled: images in the unlabelled set.
    feature_size: D, of the encoder's output.
    """

    num_classes: int
    labelled_counts: tuple[int, ...]
    num_unlabelled: int = 0
    feature_size: int = 128
    world: World = World()
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def prior(self) -> Tensor:
        """The share of every class among the initial labelled images, float32 [K]."""
        counts = torch.tensor(self.labelled_counts, dtype=torch.float32, device=self.device)
        return counts / counts.sum()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, without gradient."""
        return distributed.sum_(tensor, self.world)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over ranks, without gradient."""
        return distributed.mean(tensor, self.world)

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate over ranks along dimension 0, in the order of the global batch, without gradient."""
        return distributed.gather(tensor, self.world)

    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks; its gradient reaches every rank's part."""
        if self.world.size == 1:
            return tensor
        # Gradients are averaged over ranks: the identity, times ranks for that average, lets each part count once.
        return self.sum(tensor) + (tensor - tensor.detach()) * self.world.size


class Draws:
    """The random numbers of one iteration: functions of (seed, iteration, how many came before), the same on any
    number of ranks.
    """

    def __init__(self, seed: int, iteration: int, world: World | None = None) -> None:
        self.seed, self.iteration, self.world, self.calls = seed, iteration, world or World(), 0

    def _rng(self, kind: str) -> np.random.Generator:
        self.calls += 1
        return numpy_rng(self.seed, self.iteration, f"{kind} {self.calls}")

    def bernoulli(self, probability: Tensor) -> Tensor:
        """Return 0 or 1, float [n], with this rank's `probability` [n] of 1 each."""
        numbers = self._rng("bernoulli").random(len(probability) * self.world.size, np.float32)
        part = torch.from_numpy(numbers[self.world.slice(len(numbers))])
        return (part.to(probability.device) < probability).to(probability.dtype)

    def beta(self, alpha: float) -> float:
        """Return a number from Beta(alpha, alpha)."""
        return float(self._rng("beta").beta(alpha, alpha))

    def permutation(self, count: int) -> np.ndarray:
        """Return a permutation of `count`, int64 [count]; `count` is that of the global batch."""
        return self._rng("permutation").permutation(count)

    def quarter_turns(self, count: int) -> np.ndarray:
        """Return 0..3 for this rank's `count` images, int64 [count]."""
        turns = self._rng("turns").integers(4, size=count * self.world.size)
        return turns[self.world.slice(len(turns))]


class Training(Protocol):
    """What the hooks of a learner may use of the training that they are part of.

    valid: the held-out images, None where there are none. batches.unlabelled: all unlabelled images; batches.counts:
    images of every class in the present labelled set.
    """

    folder: Path
    run: Run
    scheduler: Scheduler
    batches: Batches
    valid: ViewedPool | None

    def predict(self, pool: ViewedPool) -> Tensor:
        """Return the measured network's logits [N, K] of all images in order."""

    def restart(self, generation: int) -> None:
        """Begin again with untrained weights, a new average, optimiser and schedule."""

    def extend_labelled(self, index: Tensor, labels: Tensor) -> None:
        """Let the labelled set be the initial one and these unlabelled images with these labels, int64 [n]."""


class Algorithm:
    """A learner. One of them is a file with a class of this kind; the mathematics is in `losses`.

    model, teacher: the network being trained and the moving average of its weights, set by the trainer before
    anything is computed. Both are in train mode during an iteration; whoever runs images through the teacher moves its
    batch statistics, as published. teacher is None where `keeps_average` is False.

    state: names of attributes that a checkpoint keeps: tensors, or objects with state_dict and load_state_dict. They
    must be those of the global batch, equal on all ranks.
    """

    state: tuple[str, ...] = ()
    keeps_average = True        # whether there is a teacher at all
    evaluates_average = True    # whether it is the teacher that is measured
    logged_pseudo_labels: tuple[str, ...] = ()  # kinds whose numbers the published log holds
    model: SemiModel
    teacher: SemiModel | None

    def __init__(self, cfg: Config, setting: Setting) -> None:
        self.cfg, self.setting = cfg, setting
        self.labelled_loss: LabelledLoss = labelled_loss(cfg, setting.labelled_counts, setting.world)

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        """Return the views of an unlabelled image, each "eval", "weak", "strong" (RandAugment on the image as it is
        stored) or "strong_resized" (RandAugment after the resize to DATASET.RESOLUTION).
        """
        return ()

    @staticmethod
    def labelled_view(cfg: Config) -> str:
        """Return the view of a labelled image."""
        return "weak"

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        """Return the losses of iteration `it` (from 0) on a batch; called in train mode."""
        raise NotImplementedError

    def ema_step(self, it: int) -> int:
        """Return the number of updates that the moving average has seen; it starts as a copy at 0."""
        return it

    def begin(self, training: Training) -> None:
        """Called once before the first iteration, before a checkpoint is loaded."""

    def evaluated(self, training: Training, it: int) -> None:
        """Called after every evaluation."""

    def after_iteration(self, training: Training, it: int) -> None:
        """Called at the end of an iteration, after evaluation and log."""

    def finish(self, training: Training) -> None:
        """Called once behind the last iteration."""

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.state}
        return {name: part if isinstance(part, (Tensor, int, float)) or part is None else part.state_dict()
                for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state:
            value = state[name]
            if isinstance(value, Tensor):
                setattr(self, name, value.to(self.setting.device))
            elif isinstance(value, (int, float)) or value is None:
                setattr(self, name, value)
            else:
                getattr(self, name).load_state_dict(value)


def ramp_up(it: int, total: int, ratio: float, schedule: str) -> float:
    """Return the factor on a consistency loss at iteration `it`: it reaches 1 after `ratio` of `total` iterations.

    schedule: "linear", or "exp" for exp(-5 (1 - share)^2).
    """
    length = total * ratio
    share = min(it / length, 1.0) if length > 0 else 1.0
    return share if schedule == "linear" else float(np.exp(-5 * (1 - share) ** 2))


def consistency_ramp(cfg: Config, it: int) -> float:
    """Return the published ramp-up coefficient of iteration `it` of a whole run."""
    return ramp_up(it, cfg.SOLVER.MAX_ITER, cfg.ALGORITHM.CONS_RAMPUP_ITERS_RATIO,
                   cfg.ALGORITHM.CONS_RAMPUP_SCHEDULE)
