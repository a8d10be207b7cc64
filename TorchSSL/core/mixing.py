"""MixUp as MixMatch and ReMixMatch use it here: only the first chunk moves the statistics of batch norm."""
from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from shared.augment import mixing
from shared.augment.mixing import Mixed
from shared.lazy import lazy
from TorchSSL.core.algorithm import classify, frozen_batchnorm

if TYPE_CHECKING:
    import numpy as np

    from TorchSSL.core.setting import Setting

torch = lazy("torch")


def draw_mixing(setting: Setting, alpha: float, inputs: list[torch.Tensor], step: int) -> tuple[float, np.ndarray]:
    """Draw the share of mixing from Beta(alpha, alpha) and a permutation of all images of all ranks, int64 [n]."""
    rng = setting.rng(step, "mixing")
    return float(rng.beta(alpha, alpha)), rng.permutation(sum(map(len, inputs)) * setting.world.size)


def forward_mixed(net: torch.nn.Module, setting: Setting, inputs: list[torch.Tensor], targets: list[torch.Tensor],
                  beta: float, permutation: np.ndarray) -> Mixed:
    """Mix the images of all ranks with each other and classify them; as in shared.augment.mixing.forward_mixed."""
    def logits(images: torch.Tensor, chunk: int) -> torch.Tensor:
        with frozen_batchnorm(net) if chunk else contextlib.nullcontext():
            return classify(net, images)

    return mixing.forward_mixed(logits, setting.world, inputs, targets, beta, permutation)
