"""Distances between two sets of images, as pure functions of their features.

Features are float [N, F], one row an image, from any detector. The first set is always the generated one, the second
the reference.

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

import torch
from torch import Tensor

from shared.cli import UserError
from shared.distributed import World, all_sum

BLOCK_DISTANCES = 1 << 24  # float64 values of one block of a distance matrix: 128 MiB
SUBSET_SEED = 2020           # which images form the subsets of KID and the splits of the inception score


# ---------------------------------------------------------------- Fréchet distance

class Moments:
    """Running mean and covariance of features: float64 sums, in constant memory."""

    def __init__(self, num_features: int, device: str | torch.device = "cpu") -> None:
        # One row and column more than features: a constant 1 beside them makes the sum and the count part of the
        # same symmetric product.
        self.sums = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add a batch, float [n, F] on any device; n may be 0."""
        features = features.to(self.sums.device, torch.float64)
        extended = torch.nn.functional.pad(features, (0, 1), value=1.0)
        self.sums.addmm_(extended.T, extended)

    def over_ranks(self, world: World) -> Moments:
        """Return the moments over all ranks."""
        total = Moments(len(self.sums) - 1, self.sums.device)
        total.sums = all_sum(self.sums, world)
        return total

    @property
    def count(self) -> int:
        """Number of images."""
        return round(self.sums[-1, -1].item())

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return float64 (mu [F], sigma [F, F]), with the unbiased covariance; UserError for fewer than 2 images."""
        if self.count < 2:
            raise UserError(f"Found {self.count} images, but need at least 2 to compute statistics")
        mu = self.sums[-1, :-1] / self.count
        sigma = (self.sums[:-1, :-1] - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return mu, (sigma + sigma.T) / 2


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Return |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians.

    mu: float64 [F]; sigma: float64 [F, F], symmetric and positive semi-definite, of any rank. The root's trace is the
    sum of the roots of the eigenvalues of sigma1 sigma2, which are those of the symmetric A^T sigma2 A where
    sigma1 = A A^T. So no matrix root is formed, and fewer images than features are no special case: A has
    as many columns as sigma1 has eigenvalues above rounding.
    """
    _check_finite(mu1, sigma1, mu2, sigma2)
    values, vectors = torch.linalg.eigh(sigma1)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor = vectors[:, kept] * values[kept].sqrt()
    roots = torch.linalg.eigvalsh(factor.T @ sigma2 @ factor).clamp(min=0).sqrt()
    return _frechet(mu1, sigma1.trace(), mu2, sigma2.trace(), roots.sum())


def frechet_distance_of_features(features1: Tensor, features2: Tensor) -> float:
    """Return the Fréchet distance between the Gaussians fitted to features [N1, F] and [N2, F], N1 and N2 from 2 on.

    With fewer images than features, the trace comes from the N1 x N2 products of centred features, whose singular
    values are those roots: exact, and fast for the few images of one class.
    """
    _check_finite(features1, features2)
    for features in (features1, features2):
        if len(features) < 2:
            raise UserError(f"Found {len(features)} images, but need at least 2 to compute statistics")
    if max(len(features1), len(features2)) >= features1.shape[1]:
        moments = [Moments(features1.shape[1], features1.device) for _ in range(2)]
        for moment, features in zip(moments, (features1, features2), strict=True):
            moment.add(features)
        return frechet_distance(*moments[0].mean_and_covariance(), *moments[1].mean_and_covariance())
    features1, features2 = features1.double(), features2.double()
    mu1, mu2 = features1.mean(0), features2.mean(0)
    # Rows divided so that sigma = factor^T factor.
    factor1 = (features1 - mu1) / math.sqrt(len(features1) - 1)
    factor2 = (features2 - mu2) / math.sqrt(len(features2) - 1)
    trace = torch.linalg.svdvals(factor1 @ factor2.T).sum()
    return _frechet(mu1, factor1.square().sum(), mu2, factor2.square().sum(), trace)


def _frechet(mu1: Tensor, trace1: Tensor, mu2: Tensor, trace2: Tensor, trace_of_root: Tensor) -> float:
    distance = (mu1 - mu2).square().sum() + trace1 + trace2 - 2 * trace_of_root
    return max(distance.item(), 0.0)  # equal sets differ by rounding in either direction


def _check_finite(*tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError("features that are not finite numbers have no Fréchet distance; check the detector's weights")


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


# ---------------------------------------------------------------- kernel distance, inception score

# torch-fidelity imports torchvision, which takes as long as torch itself.

def kernel_distance(features1: Tensor, features2: Tensor, subsets: int = 100, subset_size: int = 1000,
                    seed: int = SUBSET_SEED) -> tuple[float, float]:
    """Return KID, the mean and the standard deviation over random subsets of the squared maximum mean discrepancy.

    Each is the unbiased estimate under the cubic kernel (x.y / F + 1)^3 on `subset_size` images of either set.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    check_subset_size(subset_size, len(features1), len(features2))
    found = kid_features_to_metric(features1.double(), features2.double(), kid_subsets=subsets,
                                   kid_subset_size=subset_size, rng_seed=seed, verbose=False)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def check_subset_size(subset_size: int, *counts: int) -> None:
    """Raise UserError where sets of `counts` images have no such subsets."""
    if not 2 <= subset_size <= min(counts):
        raise UserError(f"--kid-subset-size: expected 2 to {min(counts)}, the images of the smaller set, got "
                        f"{subset_size}")


def inception_score(logits: Tensor, splits: int = 10, seed: int = SUBSET_SEED) -> tuple[float, float]:
    """Return mean and standard deviation over `splits` of exp(E KL(p(class | image) || p(class))).

    logits: float [N, classes] of a classifier.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if not 1 <= splits <= len(logits):
        raise UserError(f"--isc-splits: expected 1 to {len(logits)}, the number of images, got {splits}")
    found = isc_features_to_metric(logits, splits, rng_seed=seed)
    return found["inception_score_mean"], found["inception_score_std"]


# ---------------------------------------------------------------- precision, recall, density, coverage

@dataclass(frozen=True)
class Manifold:
    """How two sets of images cover each other, each number a fraction of images except density, which may exceed 1.

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

    The distances are computed in blocks: beside the features there are never more than BLOCK_DISTANCES of them.
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
    size = max(1, BLOCK_DISTANCES // (2 * len(y)))
    columns = max(1, BLOCK_DISTANCES // (2 * y.shape[1]))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        part = x[rows].double() - centre
        distances = torch.empty(len(part), len(y), dtype=torch.float64, device=x.device)
        for first in range(0, len(y), columns):
            other = y[first:first + columns].double() - centre
            distances[:, first:first + columns] = torch.cdist(part, other, compute_mode="use_mm_for_euclid_dist")
        yield rows, distances
