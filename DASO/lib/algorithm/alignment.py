"""Distribution alignment: predictions move from the classes' recent shares towards their target shares.

Berthelot et al., "ReMixMatch", ICLR 2020 (arXiv 1911.09785), section 3.1.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from DASO.lib.algorithm.interface import Setting

WINDOW = 128  # batches that the recent shares are the mean of, the current one included
EPSILON = 1e-6


class DistributionAlignment:
    """target: the shares to align to, float [K]. The state is the mean prediction of each of the last 128 batches."""

    def __init__(self, target: Tensor, setting: Setting) -> None:
        self.target, self.setting = target, setting
        self.means = torch.zeros(WINDOW, len(target), device=target.device)
        self.calls = 0

    @torch.no_grad()
    def __call__(self, probabilities: Tensor, exponent: float = 1.0) -> Tensor:
        """Return aligned probabilities [n, K]; the target is raised to `exponent` and normalised first."""
        self.means[self.calls % WINDOW] = self.setting.mean(probabilities.mean(0))
        self.calls += 1
        recent = self.means.sum(0) / min(self.calls, WINDOW)
        target = self.target ** exponent
        target = target / target.sum()
        aligned = probabilities * (target + EPSILON) / (recent + EPSILON)
        return aligned / aligned.sum(1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means.copy_(state["means"])
        self.calls = state["calls"]
