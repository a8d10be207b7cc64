"""DARP: pseudo-labels of the whole unlabelled set, refined until their class counts are those expected.

Kim et al., "Distribution Aligning Refinery of Pseudo-label for Imbalanced Semi-supervised Learning", NeurIPS 2020
(arXiv 2007.08844). What the original solves class by class on the host is done here for all classes at once, where the
tables are.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from DASO.lib.algorithm.interface import Setting
from DASO.lib.config.config import Config
from DASO.lib.data.long_tail import long_tail_counts
from shared.cli import UserError
from shared.data.safe import load_array

SMALLEST = 1e-6
ROOT_TOLERANCE, ROOT_ITERATIONS = 0.1, 30  # of each root; coarse as published


class DARP:
    """The predictions on every unlabelled image and what they are refined to, both [images, K] float32, at first 1/K.

    target: expected number of images of each class [K]. warm_up: calls that return their input. period: calls between
    two refinements. alpha: of class c the alpha * target[c] most probable images may keep their probability of it.
    iterations: rounds of the solver. Every rank holds the whole tables.
    """

    def __init__(self, target: torch.Tensor, setting: Setting, warm_up: int, period: int = 10, alpha: float = 2.0,
                 iterations: int = 10) -> None:
        self.target, self.setting, self.warm_up, self.period = target.double(), setting, warm_up, period
        self.iterations, self.calls, images = iterations, 0, setting.num_unlabelled
        self.kept = [min(images, int(alpha * count)) for count in target.tolist()]
        self.original = torch.full((images, len(target)), 1 / len(target), device=setting.device)
        self.refined = self.original.clone()

    @torch.no_grad()
    def __call__(self, probabilities: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Note the probabilities [n, K] of the images `index`, int64 [n], and return what they are refined to.

        Between the warm-up and the first refinement after it the refined table is still uniform, as published.
        """
        self.calls += 1
        every_index, rows = self.setting.gather(index), self.setting.gather(probabilities).to(self.original.dtype)
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

    def state_dict(self) -> dict[str, Any]:
        return {"original": self.original, "refined": self.refined, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.original, self.refined = (state[name].to(self.target.device) for name in ("original", "refined"))
        self.calls = int(state["calls"])


def most_probable(table: torch.Tensor, target: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which entries of the table [N, K] are among the kept[c] largest of their class, and each class's scale.

    The scale [K] makes the probabilities kept add up to target [K]. Of equal entries the earlier image goes first.
    """
    order = table.argsort(dim=0, descending=True, stable=True)[:max(kept)]
    among = torch.arange(len(order), device=table.device)[:, None] < torch.tensor(kept, device=table.device)
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


def make_darp(cfg: Config, setting: Setting) -> DARP:
    """Return the refinery that ALGORITHM.DARP describes; UserError where the class counts cannot be known."""
    darp = cfg.ALGORITHM.DARP
    return DARP(make_target(cfg, setting), setting, int(cfg.SOLVER.MAX_ITER * darp.WARMUP_RATIO), darp.PER_ITERS,
                darp.ALPHA, darp.NUM_DARP_ITERS)


def make_target(cfg: Config, setting: Setting) -> torch.Tensor:
    """Return how many unlabelled images of each class DARP is to find [K], float32; UserError."""
    tail = cfg.long_tail
    if tail is None:
        raise UserError(f"ALGORITHM.DARP.APPLY: nothing says how many images of each class {cfg.DATASET.NAME} has "
                        "unlabelled; choose a long-tailed data set")
    counts = long_tail_counts(max(tail.NUM_UNLABELED_HEAD, 0), max(tail.IMB_FACTOR_UL, 1), setting.num_classes)
    target = target_counts(cfg.DATASET.NAME, (tail.NUM_LABELED_HEAD, tail.IMB_FACTOR_L),
                           (tail.NUM_UNLABELED_HEAD, tail.IMB_FACTOR_UL), cfg.DATASET.REVERSE_UL_DISTRIBUTION, counts,
                           setting.num_unlabelled, Path(cfg.ALGORITHM.DARP.EST))
    return target.to(setting.device)


def target_counts(dataset: str, labelled: tuple[int, float], unlabelled: tuple[int, float], reverse: bool,
                  counts: Sequence[int], images: int, folder: Path) -> torch.Tensor:
    """Return how many unlabelled images of each class DARP is to find [K], float32; UserError.

    labelled, unlabelled: images of the largest class and imbalance of each set, -1 where unknown. Where both sets are
    alike it is the long tail `counts` of the unlabelled one; otherwise the estimate of a file in `folder`, named as
    released, scaled to the number of unlabelled `images`.
    """
    if labelled[1] == unlabelled[1] and not reverse:
        return torch.tensor(counts, dtype=torch.float32)
    return read_estimate(folder, estimate_name(dataset, labelled, unlabelled, reverse), images, len(counts))


def estimate_name(dataset: str, labelled: tuple[int, float], unlabelled: tuple[int, float], reverse: bool) -> str:
    """Return the released name of the file for an experiment."""
    return "_".join(map(str, (dataset, "l", *labelled, "ul", *unlabelled, *["rev"] * reverse, "estim.npyz")))


def read_estimate(folder: Path, name: str, total: int, classes: int) -> torch.Tensor:
    """Return the class counts [K] that the file `folder`/`name` estimates, rescaled to `total`, float32.

    The file is a plain numpy array of shape [K], whatever its name ends in. UserError.
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


def soft_confusion(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how images of each class are predicted: [K, K], column y is the mean probability of those labelled y."""
    classes = probabilities.shape[1]
    confusion = probabilities.new_zeros(classes, classes).index_add_(0, labels, probabilities).T
    return confusion / confusion.sum(0, keepdim=True)


def estimate_counts(confusion: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the class counts [K] that explain the summed predictions [K], and the confusion's condition number.

    Counts and confusion [K, K] are related by predicted = confusion @ counts. A confusion that cannot be inverted gives
    counts of nan and the condition number inf.
    """
    confusion = confusion.double()
    condition = float(torch.linalg.cond(confusion)) if confusion.isfinite().all() else math.inf
    if not math.isfinite(condition):
        return torch.full_like(predicted, math.nan, dtype=torch.float64), math.inf
    counts, failure = torch.linalg.solve_ex(confusion, predicted.double())
    return (counts, condition) if not failure else (torch.full_like(counts, math.nan), math.inf)
