"""Alignment and uniformity of features on the sphere (Wang and Isola 2020, arXiv 2005.10242)."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    """Return the mean of ||x_i - y_i||^alpha over positive pairs. x, y: [..., N, D], l2-normalised -> [...]."""
    return (x - y).norm(dim=-1).pow(alpha).mean(-1)


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Return log mean exp(-t ||x_i - x_j||^2) over all pairs i < j. x: [..., N, D], N >= 2 -> [...].

    Squared distances come from one Gram matrix, so the work is a matrix product on whatever device x is on.
    """
    count = x.shape[-2]
    square = x.square().sum(-1)
    distance = (square[..., :, None] + square[..., None, :] - 2 * x @ x.mT).clamp(min=0)
    rows, columns = torch.triu_indices(count, count, offset=1, device=x.device)
    return (-t * distance[..., rows, columns]).logsumexp(-1) - math.log(len(rows))
