"""Distribution alignment: predictions scaled so that on average they have a target distribution.

Berthelot et al., "ReMixMatch", ICLR 2020 (arXiv 1911.09785), section 3.1, with the temperature of CReST (Wei et al.,
CVPR 2021, arXiv 2102.09559, equation 3).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WINDOW = 128    # batches that the average prediction is taken over
SMALLEST = 1e-6


def plain_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over the ranks of a single process: the tensor itself."""
    return tensor


def sharpen(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return probabilities [n, K] to the power 1 / temperature, normalised again."""
    weights = probabilities ** (1 / temperature)
    return weights / weights.sum(1, keepdim=True)


class DistributionAlignment:
    """Aligns predictions with `target` [K]; its state is the mean prediction of each of the last 128 batches.

    exponent: the target is taken to this power and normalised, where a call does not say another. mean_over_ranks:
    makes the mean of a batch that of the global batch. Batches must be of one size: their means count alike.
    """

    def __init__(self, target: torch.Tensor, exponent: float = 1.0,
                 mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = plain_mean) -> None:
        self.target, self.exponent, self.mean_over_ranks = target / target.sum(), exponent, mean_over_ranks
        self.means = torch.zeros(WINDOW, len(target), dtype=target.dtype, device=target.device)
        self.batches = 0

    @torch.no_grad()
    def __call__(self, probabilities: torch.Tensor, exponent: float | None = None) -> torch.Tensor:
        """Note this batch of probabilities [n, K] and return them aligned, each row a distribution again."""
        self.means[self.batches % WINDOW] = self.mean_over_ranks(probabilities.detach().mean(0))
        self.batches += 1
        average = self.means[:self.batches].mean(0)
        target = self.target ** (self.exponent if exponent is None else exponent)
        aligned = probabilities * (target / target.sum() + SMALLEST) / (average + SMALLEST)
        return aligned / aligned.sum(1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means, self.batches = state["means"].to(self.target.device), int(state["batches"])
