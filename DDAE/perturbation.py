"""The two ways of adding noise that the noise-conditional classifiers are trained and compared under."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class VP:
    """Variance preserving, as in DDPM: x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, t in 1..n_T.

    Images come in [0, 1] and are scaled to [-1, 1]. The classifier is told t / n_T.
    """

    betas: tuple[float, float] = (1e-4, 0.02)
    n_T: int = 1000
    steps: int = 20

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the noise level of `count` training images: integers 1..n_T."""
        return rng.integers(1, self.n_T + 1, count)

    def levels(self) -> list[int]:
        """Return the levels at which a classifier is tested: 1, 51, ..., 951."""
        return list(range(1, self.n_T + 1, max(1, self.n_T // self.steps)))

    def apply(self, x: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noisy images [N, C, H, W] and the time input [N] of int64 levels t [N]."""
        betas = np.concatenate([[0], np.linspace(*self.betas, self.n_T)])
        alphabar = torch.from_numpy(np.exp(np.cumsum(np.log1p(-betas)))).to(x.device)[t.to(x.device)].view(-1, 1, 1, 1)
        noisy = alphabar.sqrt().float() * (2 * x - 1) + (1 - alphabar).sqrt().float() * noise
        return noisy, t.to(x.device).float() / self.n_T

    def test(self, x: Tensor, level: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return (noisy images, time input) with all images at one of `levels`."""
        return self.apply(x, torch.full((len(x),), level), noise)


@dataclass(frozen=True)
class VE:
    """Variance exploding, as in EDM: x + sigma noise. The classifier is told ln sigma.

    Training draws ln sigma from a normal distribution; tests run over the sampler's schedule, index 1 (sigma_min) to
    `steps` (sigma_max).
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    steps: int = 18

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the standard normal numbers from which the noise levels of `count` training images follow."""
        return rng.standard_normal(count).astype(np.float32)

    def levels(self) -> list[int]:
        return list(range(1, self.steps + 1))

    def schedule(self) -> np.ndarray:
        """Return sigma by index, float64 [steps + 1]: 0, sigma_min, ..., sigma_max."""
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        descending = (ends[0] + np.arange(self.steps) / (self.steps - 1) * (ends[1] - ends[0])) ** self.rho
        return np.concatenate([descending, [0.0]])[::-1].copy()

    def apply(self, x: Tensor, normal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noisy images [N, C, H, W] and the time input [N] of drawn numbers `normal` [N]."""
        sigma = (normal.to(x.device) * self.p_std + self.p_mean).exp()
        return self._add(x, sigma, noise)

    def test(self, x: Tensor, level: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.full((len(x),), self.schedule()[level], dtype=torch.float64)
        return self._add(x, sigma.float().to(x.device), noise)

    def _add(self, x: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x - 1 + sigma.view(-1, 1, 1, 1) * noise, sigma.log()
