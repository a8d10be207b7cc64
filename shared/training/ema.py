"""Exponential moving average of a network's parameters, in fp32, one call for all tensors."""
from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from shared.distributed import unwrap


class EMA:
    """A copy of a network whose parameters follow it: ema <- beta ema + (1 - beta) net.

    `module` is in eval mode, in fp32 (fp64 if the network is) and without gradients. buffers: "copy" takes the
    network's at each update, so that batch-norm statistics stay current; "keep" leaves them as they were.
    """

    def __init__(self, net: torch.nn.Module, buffers: str = "copy") -> None:
        self.module = copy.deepcopy(unwrap(net)).eval().requires_grad_(False)
        widest = max((tensor.dtype for tensor in self.module.parameters()), key=lambda t: t.itemsize, default=None)
        self.module.to(torch.float64 if widest == torch.float64 else torch.float32)
        self._copy_buffers = buffers == "copy"

    @torch.no_grad()
    def update(self, net: torch.nn.Module, beta: float) -> None:
        """Move towards `net` (plain, compiled or data-parallel); beta in [0, 1], 0 copies."""
        net = unwrap(net)
        torch._foreach_lerp_(list(self.module.parameters()), list(net.parameters()), 1.0 - beta)
        if self._copy_buffers:
            ours, theirs = list(self.module.buffers()), list(net.buffers())
            if ours:
                torch._foreach_copy_(ours, theirs)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state)


def half_life_beta(batch: int, halflife_nimg: float, nimg: float, rampup_ratio: float | None) -> float:
    """Return beta for one step of `batch` images such that weights halve every `halflife_nimg` images.

    `rampup_ratio`: the half-life is at most this fraction of the `nimg` images seen so far (None: no ramp). At nimg = 0
    with a ramp the result is 0: the average starts as a copy. (EDM, arXiv 2206.00364, appendix F.2)
    """
    if rampup_ratio is not None:
        halflife_nimg = min(halflife_nimg, nimg * rampup_ratio)
    return 0.5 ** (batch / max(halflife_nimg, 1e-8))


def power_law_beta(batch: int, nimg: float, sigma_rel: float) -> float:
    """Return beta for one step of `batch` images after `nimg`: images are weighted by a power of their time in the run.

    The standard deviation of that profile stays the fraction `sigma_rel` of the run, however long it becomes. At
    nimg = 0 the result is 0: the average starts as a copy. (EDM2, arXiv 2312.02696, section 3.1)
    """
    return (nimg / (nimg + batch)) ** (power_law_exponent(sigma_rel) + 1)


def power_law_exponent(sigma_rel: float) -> float:
    """Return the exponent gamma of the profile t^gamma whose standard deviation is `sigma_rel` of the run.

    0 < sigma_rel <= 1 / sqrt(12), at which gamma is 0, the plain average. Raises ValueError otherwise.
    """
    if not 0 < sigma_rel <= 12 ** -0.5:
        raise ValueError(f"sigma_rel: expected a number above 0 and at most {12 ** -0.5:.4f}, got {sigma_rel}")
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); the largest root is the one that is not negative.
    roots = np.roots([1, 7, 16 - sigma_rel ** -2, 12 - sigma_rel ** -2])
    return max(0.0, float(roots.real.max()))
