"""The feature that a DiT gives of a latent image: noised, without class, one block's tokens averaged."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from DDAE.DiT.gaussian import SpacedDiffusion
from DDAE.DiT.network import DiT


def latent_features(net: DiT, codes: Tensor, level: int, names: Sequence[str], noise: Tensor) -> dict[str, Tensor]:
    """Return block name -> float32 [N, width] of latents [N, C, S, S] noised to step `level` (0..999).

    noise: standard normal, of the shape of `codes`. The blocks behind the last named one do not run.
    """
    t = torch.full((len(codes),), level, device=codes.device)
    noisy = SpacedDiffusion().q_sample(codes, t, noise)
    no_class = torch.full_like(t, net.num_classes)
    return {name: tokens.float().mean(1) for name, tokens in net.features(noisy, t, no_class, names).items()}
