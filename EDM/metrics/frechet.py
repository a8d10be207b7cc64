"""Fréchet distance between two sets of images, from their features: Heusel et al. 2017 (arXiv 1706.08500).

Features are float [N, F], one row an image, from any network. Everything is computed in float64, on the device of the
features.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from shared.cli import UserError
from shared.distributed import World, sum_


class Moments:
    """Running mean and covariance of features: float64 sums, whatever the number of images."""

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
        """Return the moments of what all ranks have added."""
        total = Moments(len(self.sums) - 1, self.sums.device)
        total.sums = sum_(self.sums, world)
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
    sigma1 = A A^T. So no matrix root is formed, and covariances of fewer images than features are nothing special:
    A has as many columns as sigma1 has eigenvalues that are more than rounding.
    """
    _check_finite(mu1, sigma1, mu2, sigma2)
    values, vectors = torch.linalg.eigh(sigma1)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor = vectors[:, kept] * values[kept].sqrt()
    roots = torch.linalg.eigvalsh(factor.T @ sigma2 @ factor).clamp(min=0).sqrt()
    return _frechet(mu1, sigma1.trace(), mu2, sigma2.trace(), roots.sum())


def frechet_distance_of_features(features1: Tensor, features2: Tensor) -> float:
    """Return the Fréchet distance between the Gaussians fitted to features [N1, F] and [N2, F], N1 and N2 from 2 on.

    Where there are fewer images than features the trace comes from the N1 x N2 products of centred features, whose
    singular values are those roots: exact, and fast for the few images of one class.
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
