"""What CReST adds to the labelled set after each generation.

Wei et al., "CReST: A Class-Rebalancing Self-Training Framework for Imbalanced Semi-Supervised Learning", CVPR 2021
(arXiv 2102.09559), sections 3.2 and 3.3.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch


def sampling_rates(counts: Sequence[int], alpha: float) -> torch.Tensor:
    """Return mu [K], float32: (counts[c] / largest count) ** (1 / alpha), of the labelled images at the start."""
    counts = torch.tensor(counts, dtype=torch.float32)
    return (counts / counts.max()) ** (1 / alpha)


def select(probabilities: torch.Tensor, rates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which unlabelled images to add and their pseudo-labels, both int64 [added].

    probabilities: of all unlabelled images [N, K]. Of the m images predicted as class c the int(rates[K - 1 - c] * m)
    most confident are kept: the rarer a class, the more of its images (classes are taken to be sorted by falling
    frequency, as published). Class by class, within a class by falling confidence.
    """
    confidence, label = probabilities.max(1)
    by_confidence = confidence.argsort(descending=True, stable=True)
    order = by_confidence[label[by_confidence].argsort(stable=True)]
    members = torch.bincount(label, minlength=probabilities.shape[1])
    kept = (rates.flip(0).to(members.device) * members.float()).int()
    first = members.cumsum(0) - members
    rank = torch.arange(len(order), device=order.device) - first[label[order]]
    order = order[rank < kept[label[order]]]
    return order, label[order]


def alignment_exponent(generation: int, generations: int, smallest: float) -> float:
    """Return the exponent of the target distribution in a generation (from 1): from 1 down to `smallest`, linearly.

    With a single generation it is 1.
    """
    share = (generation - 1) / (generations - 1) if generations > 1 else 0.0
    return 1.0 - share + share * smallest
