"""DARP: pseudo-labels of the whole unlabelled set, refined until their class counts are those expected; DARP_ESTIM.

Kim et al., "Distribution Aligning Refinery of Pseudo-label for Imbalanced Semi-supervised Learning", NeurIPS 2020
(arXiv 2007.08844). The original solves class by class on the host; here all classes at once, on the device.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, Training
from DASO.lib.config.config import Config
from DASO.lib.data.sets import long_tail_counts
from shared.cli import UserError
from shared.data.safe import load_array
from shared.distributed import gather
from shared.training.checkpoint import Stateful
from shared.training.files import write_array
from shared.training.precision import to_device

SMALLEST = 1e-6
ROOT_TOLERANCE, ROOT_ITERATIONS = 0.1, 30  # of each root; coarse as published
ESTIMATE_FILE = "estim.npy"


class DARP(Stateful):
    """The predictions on every unlabelled image and their refinement, both [images, K] float32, at first 1/K.

    target: expected number of images of each class [K]. warm_up: calls that return their input. period: calls between
    two refinements. alpha: of class c the alpha * target[c] most probable images may keep their probability of it.
    iterations: rounds of the solver. Every rank holds the whole tables.
    """

    state = ("original", "refined", "calls")

    def __init__(self, target: torch.Tensor, setting: Setting, warm_up: int, period: int = 10, alpha: float = 2.0,
                 iterations: int = 10) -> None:
        self.target, self.world, self.warm_up, self.period = target.double(), setting.world, warm_up, period
        self.iterations, self.calls, images = iterations, 0, setting.num_unlabelled
        self.kept = [min(images, int(alpha * count)) for count in target.tolist()]
        self.original = torch.full((images, len(target)), 1 / len(target), device=setting.device)
        self.refined = self.original.clone()

    @torch.no_grad()
    def __call__(self, probabilities: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Store the probabilities [n, K] of the images `index`, int64 [n]; return their refinement.

        Between the warm-up and the first refinement after it the refined table is still uniform, as published.
        """
        self.calls += 1
        every_index = gather(index, self.world)
        rows = gather(probabilities, self.world).to(self.original.dtype)
        # An image drawn twice keeps the later row, on any device.
        place = torch.arange(len(every_index), device=index.device)
        last = torch.full((len(self.original),), -1, device=index.device).scatter_reduce_(0, every_index, place, "amax")
        self.original[every_index] = rows[last[every_index]]
        if self.calls <= self.warm_up:
            return probabilities
        if self.calls % self.period == 0:
            mask, scale = most_probable(self.original, self.target, self.kept)
            candidates = self.original * mask * scale + SMALLEST
            self.refined = solve(candidates / candidates.sum(1, keepdim=True), self.target, self.iterations).float()
        return self.refined[index].to(probabilities.dtype)


def most_probable(table: torch.Tensor, target: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which entries of the table [N, K] are among the kept[c] largest of their class, and each class's scale.

    The scale [K] makes the probabilities kept add up to target [K]. Equal entries, which most are at first, stand in
    the order in which torch.sort leaves those of a column, as in the published code.
    """
    order = torch.stack([column.sort(descending=True).indices[:max(kept)] for column in table.unbind(1)], dim=1)
    among = torch.arange(len(order), device=table.device)[:, None] < to_device(np.array(kept), table.device)
    mask = torch.zeros_like(table).scatter_(0, order, among.to(table.dtype))
    return mask, ((target + SMALLEST) / ((table * mask).sum(0) + SMALLEST)).to(table.dtype)


def solve(table: torch.Tensor, target: torch.Tensor, iterations: int) -> torch.Tensor:
    """Return the distributions nearest to the rows of `table` [N, K] whose columns add up to target [K], float64.

    Nearest by the Kullback-Leibler divergence, images that the table is sure of weighing more (equation 2 and
    algorithm 1 of the paper): coordinate ascent on the dual, a factor for every image in turn with an exponent for
    every class.
    """
    table = table.double()
    entropy = -(table * (table + SMALLEST).log()).sum(1, keepdim=True)  # the inverse of an image's weight
    table = table / math.e
    exponent, factor = table.new_zeros(table.shape[1]), (-entropy).exp().expand_as(table)
    for _ in range(iterations):
        products = table / (table * factor).sum(1, keepdim=True)
        exponent = roots(lambda nu, products=products: (products * (-nu * entropy).exp()).sum(0) - target, exponent)
        factor = (-exponent * entropy).exp()
    return table * factor / (table * factor).sum(1, keepdim=True)


def roots(function: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """Return a root of each of K functions of one number, by the secant method from `start` [K].

    function: [K] -> [K], entry by entry. The published tolerance is coarse (0.1), so where the search ends is part of
    the method: the steps are those of scipy.optimize.newton without a derivative. An entry that leaves the finite
    numbers, or is not found after 30 steps, stays at its last finite value.
    """
    before, now = start, start * (1 + 1e-4) + torch.where(start >= 0, 1e-4, -1e-4)
    at_before, at_now = function(before), function(now)
    swap = at_now.abs() < at_before.abs()
    before, now = torch.where(swap, now, before), torch.where(swap, before, now)
    at_before, at_now = torch.where(swap, at_now, at_before), torch.where(swap, at_before, at_now)
    found, done = now, torch.zeros_like(swap)
    for _ in range(ROOT_ITERATIONS):
        steep = at_now.abs() > at_before.abs()
        ratio = torch.where(steep, at_before / at_now, at_now / at_before)
        following = torch.where(steep, before - ratio * now, now - ratio * before) / (1 - ratio)
        flat = at_now == at_before
        following = torch.where(flat, (now + before) / 2, following)
        stuck = ~following.isfinite()
        found = torch.where(done | stuck, found, following)
        done = done | stuck | flat | ((following - now).abs() <= ROOT_TOLERANCE)
        if done.all():
            break
        before, at_before, now = now, at_now, torch.where(done, now, following)
        at_now = function(now)
    return found


# ------------------------------------------------------------------------------------------------ expected class counts

def make_darp(cfg: Config, setting: Setting) -> DARP | None:
    """Return the refinery if ALGORITHM.DARP.APPLY; UserError for unknown class counts."""
    darp = cfg.ALGORITHM.DARP
    if not darp.APPLY:
        return None
    return DARP(expected_counts(cfg, setting), setting, int(cfg.SOLVER.MAX_ITER * darp.WARMUP_RATIO), darp.PER_ITERS,
                darp.ALPHA, darp.NUM_DARP_ITERS)


def expected_counts(cfg: Config, setting: Setting) -> torch.Tensor:
    """Return the expected number of unlabelled images of each class [K], float32; UserError.

    If both sets are alike it is the long tail of the unlabelled one; otherwise the estimate of a file in the folder
    ALGORITHM.DARP.EST, named as released, scaled to the number of unlabelled images.
    """
    tail, classes = cfg.long_tail, setting.num_classes
    if tail is None:
        raise UserError(f"ALGORITHM.DARP.APPLY: the unlabelled class counts of {cfg.DATASET.NAME} are "
                        "unknown; choose a long-tailed data set")
    labelled, unlabelled = cfg.DATASET.LABELED_COUNTS, cfg.DATASET.UNLABELED_COUNTS
    if labelled or unlabelled:
        if labelled and unlabelled and np.linalg.matrix_rank(np.array([labelled, unlabelled])) < 2:
            return torch.tensor(unlabelled, dtype=torch.float32, device=setting.device)
    elif tail.IMB_FACTOR_L == tail.IMB_FACTOR_UL and not cfg.DATASET.REVERSE_UL_DISTRIBUTION:
        counts = long_tail_counts(max(tail.NUM_UNLABELED_HEAD, 0), max(tail.IMB_FACTOR_UL, 1), classes)
        return torch.tensor(counts, dtype=torch.float32, device=setting.device)
    folder = Path(cfg.ALGORITHM.DARP.EST)
    return read_estimate(folder, estimate_name(cfg), setting.num_unlabelled, classes).to(setting.device)


def estimate_name(cfg: Config) -> str:
    """Return the released name of the file for an experiment."""
    tail, reverse = cfg.long_tail, cfg.DATASET.REVERSE_UL_DISTRIBUTION
    name = Path(cfg.DATASET.NAME).resolve().stem if cfg.is_own else cfg.DATASET.NAME
    return "_".join(map(str, (name, "l", tail.NUM_LABELED_HEAD, tail.IMB_FACTOR_L, "ul",
                              tail.NUM_UNLABELED_HEAD, tail.IMB_FACTOR_UL, *["rev"] * reverse, "estim.npyz")))


def read_estimate(folder: Path, name: str, total: int, classes: int) -> torch.Tensor:
    """Return the class counts [K] that the file `folder`/`name` estimates, rescaled to `total`, float32.

    The file is a plain numpy array of shape [K], with any ending. UserError.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"DARP needs {path}, the estimated class counts of the unlabelled images: train "
                        "configs/*/darp_estim.yaml with this data set and copy its estim.npy there, or name another "
                        "folder by ALGORITHM.DARP.EST")
    counts = load_array(path)
    if counts.shape != (classes,) or not np.isfinite(counts).all() or counts.min() < 0 or counts.sum() <= 0:
        raise UserError(f"{path}: expected {classes} class counts, none negative")
    return torch.from_numpy(counts * (total / counts.sum())).float()


# ---------------------------------------------------------------------------------------------------------- DARP_ESTIM

class DARPEstimate(Algorithm):
    """Supervised training that estimates the unlabelled class counts, which DARP needs.

    The confusion of held-out labelled images explains the sum of the predictions on unlabelled ones (Lipton et al.,
    ICML 2018, arXiv 1802.03916, equation 4). Every evaluation makes an estimate; it is accepted if no count is negative
    and the confusion is conditioned better than ALGORITHM.DARP_ESTIM.THRESH_COND. Their mean is written to estim.npy in
    the run's folder. State: `total` [K], the sum of those accepted, and `accepted`.
    """

    views = ()
    state = ("total", "accepted")
    evaluates_average = False

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.total = torch.zeros(setting.num_classes, dtype=torch.float64, device=setting.device)
        self.accepted = 0

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        logits = self.model(batch.labelled)
        return Step({"loss_cls": self.labelled_loss(logits, batch.labels, it)}, logits)

    def begin(self, training: Training) -> None:
        if training.valid is None:
            raise UserError("DARP_ESTIM compares predictions with held-out labels: set DATASET.NUM_VALID or "
                            "ALGORITHM.DARP_ESTIM.PER_CLASS_VALID_SAMPLES above 0")

    @torch.no_grad()
    def evaluated(self, training: Training, it: int) -> None:
        """Estimate. The last, incomplete batch of unlabelled images is left out, as published."""
        size = self.cfg.SOLVER.IMS_PER_BATCH * self.cfg.SOLVER.UNLABELED_BATCH_RATIO
        pools = training.valid, training.batches.unlabelled
        valid, unlabelled = (training.predict(pool).softmax(1) for pool in pools)
        whole = len(unlabelled) // size * size or len(unlabelled)
        confusion = soft_confusion(valid, training.valid.labels)
        counts, condition = estimate_counts(confusion, unlabelled[:whole].sum(0))
        if bool((counts >= 0).all()) and condition < self.cfg.ALGORITHM.DARP_ESTIM.THRESH_COND:
            self.total, self.accepted = self.total + counts, self.accepted + 1
        if it + 1 == self.cfg.SOLVER.MAX_ITER:
            self.write(training)

    def write(self, training: Training) -> None:
        """Write the mean estimate, and print the place where DARP reads it."""
        show = training.run.log.print
        if not self.accepted:
            show("no estimate of the unlabelled class counts was accepted: train longer, or raise "
                 "ALGORITHM.DARP_ESTIM.THRESH_COND")
            return
        estimate, path = (self.total / self.accepted).cpu().numpy(), training.folder / ESTIMATE_FILE
        if self.setting.world.main:
            write_array(path, estimate)
        show(f"estimated unlabelled class counts: {np.round(estimate, 1).tolist()}")
        if self.cfg.long_tail is not None:
            show(f"for DARP: copy {path} to {self.cfg.ALGORITHM.DARP.EST}/{estimate_name(self.cfg)}")


def soft_confusion(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how images of each class are predicted: [K, K], column y is the mean probability of those labelled y."""
    classes = probabilities.shape[1]
    confusion = probabilities.new_zeros(classes, classes).index_add_(0, labels, probabilities).T
    return confusion / confusion.sum(0, keepdim=True)


def estimate_counts(confusion: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the class counts [K] that explain the summed predictions [K], and the confusion's condition number.

    predicted = confusion @ counts, with confusion [K, K]. One that cannot be inverted has the condition number inf.
    """
    confusion = confusion.double()
    if not confusion.isfinite().all():  # a class without held-out images
        return torch.full_like(predicted, math.nan, dtype=torch.float64), math.inf
    counts, failed = torch.linalg.solve_ex(confusion, predicted.double())
    return counts, math.inf if failed else float(torch.linalg.cond(confusion))
