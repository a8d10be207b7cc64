"""Distances between two sets of images, as pure functions of their features.

Features are float [N, F], one row an image, from any detector. The first set is always the generated one, the second
the reference. Everything is computed in float64, on the device of the features.

    FID                Heusel et al. 2017 (arXiv 1706.08500)
    FD-DINOv2          the same in DINOv2 features, Stein et al. 2023 (2306.04675)
    KID                Binkowski et al. 2018 (1801.01401)
    precision, recall  Kynkäänniemi et al. 2019 (1904.06991)
    density, coverage  Naeem et al. 2020 (2002.09797)
    inception score    Salimans et al. 2016 (1606.03498)
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from EDM.metrics.frechet import frechet_distance_of_features
from shared.cli import UserError

DISTANCES_AT_ONCE = 1 << 24  # float64 values of one block of a distance matrix: 128 MiB
SUBSET_SEED = 2020           # which images form the subsets of KID and the splits of the inception score


# ---------------------------------------------------------------- Fréchet distance of classes

def classwise_frechet_distance(features1: Tensor, labels1: Tensor, features2: Tensor, labels2: Tensor) -> Tensor:
    """Return float64 [C], the Fréchet distance of each class of the reference; CW-FID is their mean.

    features: float [N, F]; labels: int64 [N] in 0..C-1. Raises UserError where a class has fewer than 2 images in
    either set, or the first set has a class that the reference lacks.
    """
    classes = int(max(labels1.max().item(), labels2.max().item())) + 1
    distances = torch.zeros(classes, dtype=torch.float64)
    for label in range(classes):
        chosen1, chosen2 = labels1 == label, labels2 == label
        for chosen, which in ((chosen1, "images"), (chosen2, "reference")):
            if chosen.sum() < 2:
                raise UserError(f"--metrics: cwfid needs 2 images of every class in both sets, but class {label} has "
                                f"{int(chosen.sum())} in the {which}")
        distances[label] = frechet_distance_of_features(features1[chosen1], features2[chosen2])
    return distances


# ---------------------------------------------------------------- kernel distance

def kernel_distance(features1: Tensor, features2: Tensor, subsets: int = 100, subset_size: int = 1000,
                    seed: int = SUBSET_SEED) -> tuple[float, float]:
    """Return KID, the mean and the standard deviation over random subsets of the squared maximum mean discrepancy.

    Each is the unbiased estimate under the cubic kernel (x.y / F + 1)^3 on `subset_size` images of either set. The
    subsets are drawn as torch-fidelity draws them, without replacement, so that the same features give the same value.
    """
    check_subset_size(subset_size, len(features1), len(features2))
    rng = np.random.RandomState(seed)  # the generator that published values were drawn with
    estimates = []
    for _ in range(subsets):
        part1 = features1[torch.from_numpy(rng.choice(len(features1), subset_size, replace=False))].double()
        part2 = features2[torch.from_numpy(rng.choice(len(features2), subset_size, replace=False))].double()
        within = _off_diagonal_mean(_cubic_kernel(part1, part1)) + _off_diagonal_mean(_cubic_kernel(part2, part2))
        estimates.append((within - 2 * _cubic_kernel(part1, part2).mean()).item())
    return float(np.mean(estimates)), float(np.std(estimates))


def check_subset_size(subset_size: int, *counts: int) -> None:
    """Raise UserError where sets of `counts` images have no such subsets."""
    if not 2 <= subset_size <= min(counts):
        raise UserError(f"--kid-subset-size: expected 2 to {min(counts)}, the images of the smaller set, got "
                        f"{subset_size}")


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))


# ---------------------------------------------------------------- precision, recall, density, coverage

@dataclass(frozen=True)
class Manifold:
    """How two sets of images cover each other, each number a share of images except density, which may exceed 1.

    precision: generated images that lie in the ball of a reference image. recall: reference images that lie in the
    ball of a generated image. density: reference balls around a generated image, over k. coverage: reference images
    with a generated image in their ball. A ball reaches to the k-th nearest neighbour within its own set.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(generated: Tensor, reference: Tensor, k: int = 3, k_density: int = 5) -> Manifold:
    """Return precision and recall with k neighbours, density and coverage with k_density.

    The distances are computed in blocks: beside the features there are never more than DISTANCES_AT_ONCE of them.
    Raises UserError where a set has no k-th neighbour.
    """
    check_neighbours(k, k_density, len(generated), len(reference))
    # Distances do not depend on the origin, and near the data they lose the fewest digits.
    centre = reference.double().mean(0)
    reach, reach_density = _neighbour_distances(reference, centre, (k, k_density))
    own_reach, = _neighbour_distances(generated, centre, (k,))
    inside = balls = 0.0
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    covered = recalled.clone()
    for rows, distances in _distance_blocks(generated, reference, centre):
        inside += (distances <= reach).any(1).sum().item()
        recalled |= (distances <= own_reach[rows, None]).any(0)
        near = distances <= reach_density
        balls += near.sum().item()
        covered |= near.any(0)
    return Manifold(precision=inside / len(generated), recall=recalled.double().mean().item(),
                    density=balls / (k_density * len(generated)), coverage=covered.double().mean().item())


def check_neighbours(k: int, k_density: int, *counts: int) -> None:
    """Raise UserError where in a set of one of the `counts` an image has no k-th neighbour."""
    for flag, value in (("--pr-k", k), ("--dc-k", k_density)):
        if not 1 <= value < min(counts):
            raise UserError(f"{flag}: expected 1 to {min(counts) - 1}, less than the images of the smaller set, "
                            f"got {value}")


def _neighbour_distances(features: Tensor, centre: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Return for each k the distance [N] of every row to its k-th nearest neighbour among the others."""
    found = [torch.empty(len(features), dtype=torch.float64, device=features.device) for _ in ks]
    for rows, distances in _distance_blocks(features, features, centre):
        nearest = distances.topk(max(ks) + 1, dim=1, largest=False).values  # the first is the row itself
        for own, k in zip(found, ks, strict=True):
            own[rows] = nearest[:, k]
    return found


def _distance_blocks(x: Tensor, y: Tensor, centre: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows of x, distances [rows, N] to all of y), float64."""
    size = max(1, DISTANCES_AT_ONCE // (2 * len(y)))
    columns = max(1, DISTANCES_AT_ONCE // (2 * y.shape[1]))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        part = x[rows].double() - centre
        distances = torch.empty(len(part), len(y), dtype=torch.float64, device=x.device)
        for first in range(0, len(y), columns):
            other = y[first:first + columns].double() - centre
            distances[:, first:first + columns] = torch.cdist(part, other, compute_mode="use_mm_for_euclid_dist")
        yield rows, distances


# ---------------------------------------------------------------- inception score

def inception_score(logits: Tensor, splits: int = 10, seed: int = SUBSET_SEED) -> tuple[float, float]:
    """Return mean and standard deviation over `splits` of exp(E KL(p(class | image) || p(class))).

    logits: float [N, classes] of a classifier. The images are shuffled first, as torch-fidelity does it.
    """
    if not 1 <= splits <= len(logits):
        raise UserError(f"--isc-splits: expected 1 to {len(logits)}, the number of images, got {splits}")
    order = np.random.RandomState(seed).permutation(len(logits))
    scores = []
    for split in range(splits):
        part = order[split * len(logits) // splits:(split + 1) * len(logits) // splits]
        log_p = logits[torch.from_numpy(part)].double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))
