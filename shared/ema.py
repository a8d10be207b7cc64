"""Exponential moving average of a network's parameters, in fp32, one call for all tensors."""
from __future__ import annotations

import copy
from typing import Any

import torch

from shared.distributed import unwrap


class EMA:
    """A copy of a network whose parameters follow it: ema <- beta ema + (1 - beta) net.

    `module` is in eval mode, fp32 and without gradients. Floating-point buffers are copied from the network at each
    update with buffers="copy" (batch-norm statistics stay current) and left as they were with buffers="keep".
    """

    def __init__(self, net: torch.nn.Module, buffers: str = "copy") -> None:
        self.module = copy.deepcopy(unwrap(net)).float().eval().requires_grad_(False)
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

    `rampup_ratio`: the half-life is at most this share of the `nimg` images seen so far (None: no ramp). At nimg = 0
    with a ramp the result is 0: the average starts as a copy. (EDM, arXiv 2206.00364, appendix F.2)
    """
    if rampup_ratio is not None:
        halflife_nimg = min(halflife_nimg, nimg * rampup_ratio)
    return 0.5 ** (batch / max(halflife_nimg, 1e-8))
