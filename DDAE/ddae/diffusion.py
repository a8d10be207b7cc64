"""The two diffusion models of DDAE: noise levels, training loss, features and samplers.

DDPM (Ho et al., arXiv 2006.11239; DDIM: Song et al., arXiv 2010.02502) and EDM (Karras et al., arXiv 2206.00364), as
"Denoising Diffusion Autoencoders are Unified Self-supervised Learners" (arXiv 2303.09769) uses them. Both have the
methods `draw`, `perturb`, `loss`, `features`, `levels`, `test_levels` and `sample`. Networks are arguments: called as
net(x, t, aug), and for features as net.features(x, t, names). Random numbers are arguments, too.

Images are float32 [N, C, H, W] in [-1, 1], where `x01` is written in [0, 1].
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from EDM.training.augment import AugmentPipe
from shared.cli import UserError
from shared.training.precision import to_device

Noise = Callable[[int], Tensor]  # the standard normal numbers of a sampler's step, counted from 0; asked in order

FEATURE_STEPS = 18  # of the EDM schedule in which feature levels are counted
AUGMENTATIONS = dict(xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def pool(blocks: Mapping[str, Tensor], norm: bool = False) -> dict[str, Tensor]:
    """Return the mean over pixels of each block's output, float32 [N, C]; of length 1 with `norm`."""
    pooled = {name: block.float().mean(dim=(2, 3)) for name, block in blocks.items()}
    return {name: F.normalize(feature, dim=1) for name, feature in pooled.items()} if norm else pooled


class DDPM:
    """Discrete times 1..n_T. The network predicts the noise, and is told t / n_T.

    betas: first and last variance of the linear schedule, 0 < betas[0] < betas[1] < 1. clip: samplers clip the
    predicted image to [-1, 1]. exact_end: DDIM uses the tables of training, whose last level is free of noise; the
    published ones have n_T + 1 variances and end at variance betas[0].
    """

    kind = "DDPM"
    grid_levels = (1, 11, 21)
    augment: AugmentPipe | None = None

    def __init__(self, betas: Sequence[float], n_T: int, clip: bool = True, exact_end: bool = False) -> None:
        if not (len(betas) == 2 and 0 < betas[0] < betas[1] < 1):
            raise UserError(f"diffusion.betas: expected two rising numbers between 0 and 1, got {list(betas)}")
        if n_T < 2:
            raise UserError(f"diffusion.n_T: expected at least 2, got {n_T}")
        self.n_T, self.clip = n_T, clip
        self.train_tables = schedule_tables(np.concatenate([[0.0], np.linspace(*betas, n_T)]))
        self.ddim_tables = self.train_tables if exact_end else schedule_tables(np.linspace(*betas, n_T + 1))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the times of `count` training images: int64 [count] in 1..n_T, on the generator's device."""
        return torch.randint(1, self.n_T + 1, [count], generator=generator, device=generator.device)

    def perturb(self, x: Tensor, t: int | Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return √ᾱ_t x + √(1-ᾱ_t) noise and the network's time; t: one for all, or int64 [N]."""
        t = to_device(torch.as_tensor(t), x.device).reshape(-1)
        scale, std = (self._table(name, x.device)[t][:, None, None, None] for name in ("sqrtab", "sqrtmab"))
        return scale * x + std * noise, t / self.n_T

    def loss(self, net: torch.nn.Module, x: Tensor, level: Tensor, noise: Tensor, aug: Tensor | None = None) -> Tensor:
        """Return the mean over all elements of (noise - prediction)². level: [N] from `draw`. aug is not used."""
        noised, t = self.perturb(x, level, noise)
        return F.mse_loss(net(noised, t).float(), noise)

    def levels(self) -> range:
        """Return the times at which features can be asked for."""
        return range(self.n_T + 1)

    def test_levels(self, count: int = 20) -> list[int]:
        """Return the times at which noise-conditional classifiers are tested: 1, 51, ... for n_T = 1000."""
        return list(range(1, self.n_T + 1, max(1, self.n_T // count)))

    def features(self, net: Any, x01: Tensor, t: int | Tensor, noise: Tensor, names: Sequence[str] | None = None,
                 norm: bool = False) -> dict[str, Tensor]:
        """Return pooled outputs (see `pool`) of the blocks `names` (None: all) for images noised to time t."""
        return pool(net.features(*self.perturb(2 * x01 - 1, t, noise), names), norm)

    def default_steps(self) -> int:
        """Return 100, the published number of DDIM steps, or n_T if that is less."""
        return min(100, self.n_T)

    def evaluations(self, mode: str, steps: int) -> int:
        """Return how often a sampler calls the network."""
        return self.n_T if mode == "DDPM" else len(self.ddim_times(steps)) - 1

    def ddim_times(self, steps: int) -> list[int]:
        """Return the times of DDIM, falling, the last one 0. The stride is n_T // steps: they may be more than `steps`.

        Raises UserError for more steps than n_T.
        """
        if not 1 <= steps <= self.n_T:
            raise UserError(f"--steps: expected 1 to {self.n_T} (n_T of the config), got {steps}")
        return [*(time + 1 for time in reversed(range(0, self.n_T, self.n_T // steps))), 0]

    @torch.no_grad()
    def sample(self, net: torch.nn.Module, latents: Tensor, noise: Noise, mode: str = "DDIM", steps: int | None = None,
               eta: float = 0.0) -> Tensor:
        """Return images [N, C, H, W], float32 in about [0, 1] (not clamped), from standard normal `latents`.

        mode "DDPM": all n_T steps, and steps and eta are ignored; "DDIM": see `ddim_times`; eta in [0, 1] is the
        fraction of DDPM's randomness.
        """
        if mode == "DDPM":
            return (self._sample_ddpm(net, latents, noise) + 1) / 2
        return (self._sample_ddim(net, latents, noise, steps or self.default_steps(), eta) + 1) / 2

    def _sample_ddpm(self, net: torch.nn.Module, x: Tensor, noise: Noise) -> Tensor:
        tables = {name: table.tolist() for name, table in self.train_tables.items()}
        for step, t in enumerate(range(self.n_T, 0, -1)):
            _, eps = self._clipped(net, x, t, tables)
            x = (x - tables["ma_over_sqrtmab"][t] * eps) * tables["oneover_sqrta"][t]
            if t > 1:
                x = x + tables["sqrt_beta_t"][t] * noise(step)
        return x

    def _sample_ddim(self, net: torch.nn.Module, x: Tensor, noise: Noise, steps: int, eta: float) -> Tensor:
        tables = {name: table.tolist() for name, table in self.ddim_tables.items()}
        times = self.ddim_times(steps)
        for step, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
            x0, eps = self._clipped(net, x, t, tables)
            ab, ab_after = tables["alphabar_t"][t], tables["alphabar_t"][after]
            c1 = eta * math.sqrt(max((1 - ab / ab_after) * (1 - ab_after) / (1 - ab), 0.0))
            c2 = math.sqrt(max(1 - ab_after - c1**2, 0.0))
            x = math.sqrt(ab_after) * x0 + c2 * eps
            if after > 0 and c1 > 0:
                x = x + c1 * noise(step)
        return x

    def _clipped(self, net: torch.nn.Module, x: Tensor, t: int, tables: Mapping[str, list[float]]
                 ) -> tuple[Tensor, Tensor]:
        """Return the predicted image, clipped, and the noise that follows from it."""
        eps = net(x, torch.full([1], t / self.n_T, device=x.device)).float()
        scale, std = tables["sqrtab"][t], tables["sqrtmab"][t]
        x0 = (x - std * eps) / scale
        if not self.clip:
            return x0, eps
        x0 = x0.clamp(-1, 1)
        return x0, (x - scale * x0) / std

    def _table(self, name: str, device: torch.device) -> Tensor:
        if self.train_tables[name].device != device:  # moved once
            self.train_tables = {key: table.to(device) for key, table in self.train_tables.items()}
        return self.train_tables[name]


def schedule_tables(betas: np.ndarray) -> dict[str, Tensor]:
    """Return the tables of the variances [n_T + 1], float32 under the published names.

    alpha_t = 1 - β, alphabar_t = ∏ alpha; sqrt_beta_t = √β, oneover_sqrta = 1/√alpha, sqrtab = √alphabar,
    sqrtmab = √(1 - alphabar), ma_over_sqrtmab = (1 - alpha)/sqrtmab, which is 0 where that is 0/0.
    """
    alphabar = np.exp(np.cumsum(np.log1p(-betas)))
    sqrtmab = np.sqrt(-np.expm1(np.cumsum(np.log1p(-betas))))
    ratio = np.divide(betas, sqrtmab, out=np.zeros_like(betas), where=sqrtmab > 0)
    tables = dict(alpha_t=1 - betas, oneover_sqrta=1 / np.sqrt(1 - betas), sqrt_beta_t=np.sqrt(betas),
                  alphabar_t=alphabar, sqrtab=np.sqrt(alphabar), sqrtmab=sqrtmab, ma_over_sqrtmab=ratio)
    return {name: torch.from_numpy(table.astype(np.float32)) for name, table in tables.items()}


class EDM:
    """Continuous noise levels σ. The denoiser is c_skip x + c_out F(c_in x; ln σ / 4) with the coefficients of EDM.

    sigma_data: standard deviation of the images. p_mean, p_std: of ln σ in training. sigma_min, sigma_max, rho: of the
    sampling schedule. S_min, S_max: levels between which a stochastic sampler adds noise, S_noise: its scale.
    augment_prob: of each augmentation in training; 0 is none. clip: the sampler clips the denoised image to [-1, 1],
    which EDM's own does not.
    """

    kind = "EDM"
    grid_levels = (3, 4, 5)

    def __init__(self, sigma_data: float = 0.5, p_mean: float = -1.2, p_std: float = 1.2, sigma_min: float = 0.002,
                 sigma_max: float = 80, rho: float = 7, S_min: float = 0.01, S_max: float = 1, S_noise: float = 1.007,
                 augment_prob: float = 0, clip: bool = True) -> None:
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"diffusion: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_data, self.p_mean, self.p_std = sigma_data, p_mean, p_std
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.S_min, self.S_max, self.S_noise, self.clip = S_min, S_max, S_noise, clip
        self.augment = AugmentPipe(p=augment_prob, **AUGMENTATIONS) if augment_prob else None

    def schedule(self, steps: int) -> np.ndarray:
        """Return the noise levels of a sampler, float64 [steps + 1], falling from sigma_max over sigma_min to 0."""
        return karras_schedule(steps, self.sigma_min, self.sigma_max, self.rho)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw standard normal numbers float32 [count], from which the noise levels of training images follow."""
        return torch.randn([count], generator=generator, device=generator.device)

    def training_sigma(self, level: Tensor) -> Tensor:
        """Return σ of drawn numbers."""
        return (self.p_std * level + self.p_mean).exp()

    def sigma(self, t: int | Tensor, steps: int = FEATURE_STEPS) -> Tensor:
        """Return σ, float64 [1] or [N], of places t in the rising schedule: 0 is 0, 1 sigma_min, `steps` sigma_max."""
        t = torch.as_tensor(t)
        return _rising(steps, self.sigma_min, self.sigma_max, self.rho, t.device)[t.reshape(-1)]

    def perturb(self, x: Tensor, t: int | Tensor, noise: Tensor, steps: int = FEATURE_STEPS) -> tuple[Tensor, Tensor]:
        """Return x + σ noise and σ (float32, [1, 1, 1, 1] or [N, 1, 1, 1]) for places t of the schedule."""
        sigma = to_device(self.sigma(t, steps).float(), x.device).reshape(-1, 1, 1, 1)
        return x + sigma * noise, sigma

    def denoise(self, net: torch.nn.Module, x: Tensor, sigma: Tensor, aug: Tensor | None = None) -> Tensor:
        """Return the denoised image, float32; sigma: float32 [N, 1, 1, 1] or one for all."""
        x, variance = x.float(), sigma**2 + self.sigma_data**2
        out = net(x / variance.sqrt(), sigma.log().flatten() / 4, aug).float()
        return self.sigma_data**2 / variance * x + sigma * self.sigma_data / variance.sqrt() * out

    def loss(self, net: torch.nn.Module, x: Tensor, level: Tensor, noise: Tensor, aug: Tensor | None = None) -> Tensor:
        """Return the mean over all elements of (σ²+σ_data²)/(σσ_data)² (x - denoised)².

        level: [N] from `draw`. x: the augmented images where `aug`, the labels of the augmentation, are given.
        """
        sigma = self.training_sigma(level).reshape(-1, 1, 1, 1)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return (weight * (x - self.denoise(net, x + sigma * noise, sigma, aug)) ** 2).mean()

    def levels(self) -> range:
        """Return the places in the rising schedule at which features can be asked for."""
        return range(1, FEATURE_STEPS + 1)

    def test_levels(self, count: int = FEATURE_STEPS) -> list[int]:
        """Return the places at which noise-conditional classifiers are tested: 1..18."""
        return list(range(1, count + 1))

    def features(self, net: Any, x01: Tensor, t: int | Tensor, noise: Tensor, names: Sequence[str] | None = None,
                 norm: bool = False, steps: int = FEATURE_STEPS) -> dict[str, Tensor]:
        """Return pooled outputs (see `pool`) of the blocks `names` (None: all) for images noised to place t."""
        noised, sigma = self.perturb(2 * x01 - 1, t, noise, steps)
        scaled = noised / (sigma**2 + self.sigma_data**2).sqrt()
        return pool(net.features(scaled, sigma.log().flatten() / 4, names), norm)

    def default_steps(self) -> int:
        """Return 18, the published number."""
        return 18

    def evaluations(self, mode: str, steps: int) -> int:
        """Return how often the sampler calls the network."""
        return 2 * steps - 1

    @torch.no_grad()
    def sample(self, net: torch.nn.Module, latents: Tensor, noise: Noise, mode: str = "DDIM", steps: int | None = None,
               eta: float = 0.0) -> Tensor:
        """Return images [N, C, H, W], float64 in about [0, 1] (not clamped), from standard normal `latents`.

        Heun's method with 2·steps - 1 calls. eta: each step between S_min and S_max first raises the noise level by the
        factor 1 + (√2 - 1)·eta. mode is ignored.
        """
        steps = steps or self.default_steps()
        sigmas = self.schedule(steps).tolist()
        x = latents.double() * sigmas[0]
        for step, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            gamma = (math.sqrt(2) - 1) * eta if self.S_min <= sigma <= self.S_max else 0.0
            raised = sigma * (1 + gamma)
            if gamma > 0:
                x = x + math.sqrt(raised**2 - sigma**2) * self.S_noise * noise(step).double()
            slope = (x - self._denoised(net, x, raised)) / raised
            euler = x + (after - raised) * slope
            if step < steps - 1:
                slope = (slope + (euler - self._denoised(net, euler, after)) / after) / 2
                euler = x + (after - raised) * slope
            x = euler
        return (x + 1) / 2

    def _denoised(self, net: torch.nn.Module, x: Tensor, sigma: float) -> Tensor:
        level = torch.full([1, 1, 1, 1], sigma, dtype=torch.float32, device=x.device)
        denoised = self.denoise(net, x, level).to(x.dtype)
        return denoised.clamp(-1, 1) if self.clip else denoised


def karras_schedule(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Return the schedule of EDM's equation 5, float64 [steps + 1], and 0. Raises UserError for fewer than 2 steps."""
    if steps < 2:
        raise UserError(f"--steps: expected at least 2, got {steps}")
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (first + np.arange(steps) / (steps - 1) * (last - first)) ** rho
    return np.append(sigmas, 0.0)


@lru_cache(maxsize=16)
def _rising(steps: int, sigma_min: float, sigma_max: float, rho: float, device: torch.device) -> Tensor:
    return to_device(karras_schedule(steps, sigma_min, sigma_max, rho)[::-1], device)


DIFFUSIONS = {"DDPM": DDPM, "EDM": EDM}
