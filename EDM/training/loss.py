"""Training losses of the three parameterisations: weighted squared error of the denoised image (table 1 of "Elucidating
the Design Space of Diffusion-Based Generative Models", Karras et al., arXiv 2206.00364).

The random numbers of a loss are arguments: they are drawn for the global batch and shared out.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch


class DenoisingLoss:
    """λ(σ)·(D(images + σ·noise; σ) - images)², unreduced.

    Called as loss_fn(net, images, labels, augment_labels, level, noise): images [N, C, R, R] in [-1, 1] (the augmented
    ones, as the target is augmented too), labels one-hot [N, label_dim] or None, augment_labels [N, augment_dim] or
    None, level [N, 1, 1, 1] from `draw`, noise [N, C, R, R] standard normal; returns [N, C, R, R].
    """

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return [count, 1, 1, 1] on the generator's device, from which noise levels follow: uniform in [0, 1)."""
        return torch.rand([count, 1, 1, 1], generator=generator, device=generator.device)

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        """Return the noise level of a drawn number."""
        raise NotImplementedError

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the weight λ of the squared error at a noise level."""
        return 1 / sigma**2

    def __call__(self, net: Callable[..., torch.Tensor], images: torch.Tensor, labels: torch.Tensor | None,
                 augment_labels: torch.Tensor | None, level: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        sigma = self.sigma(level)
        denoised = net(images + sigma * noise, sigma, labels, augment_labels=augment_labels)
        return self.weight(sigma) * (denoised - images) ** 2


class EDMLoss(DenoisingLoss):
    """Noise levels from a log-normal distribution, weighted to start with equal losses."""

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5) -> None:
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return standard normal numbers [count, 1, 1, 1] on the generator's device."""
        return torch.randn([count, 1, 1, 1], generator=generator, device=generator.device)

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        return (level * self.P_std + self.P_mean).exp()

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VPLoss(DenoisingLoss):
    """Times uniform in [ε_t, 1] of the variance-preserving SDE."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5) -> None:
        self.beta_d, self.beta_min, self.epsilon_t = beta_d, beta_min, epsilon_t

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        t = 1 + level * (self.epsilon_t - 1)
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).exp().sub(1).sqrt()


class VELoss(DenoisingLoss):
    """Noise levels log-uniform in [sigma_min, sigma_max)."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        return self.sigma_min * (level * math.log(self.sigma_max / self.sigma_min)).exp()


LOSSES = {"EDMLoss": EDMLoss, "VPLoss": VPLoss, "VELoss": VELoss}


def make_loss(loss_kwargs: Mapping[str, Any]) -> DenoisingLoss:
    """Return the loss of a published option dictionary; of TDSM's, the one whose noise levels and weights it takes."""
    name = loss_kwargs["class_name"].removeprefix("training.loss.")
    kind = next(kind for kind in ("EDM", "VP", "VE") if name.startswith(kind))
    constants = {name: loss_kwargs[name] for name in ("sigma_data", "P_mean", "P_std") if name in loss_kwargs}
    return LOSSES[f"{kind}Loss"](**constants)
