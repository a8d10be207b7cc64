"""Samplers: from Gaussian noise to images along the probability-flow ODE of a denoiser.

Every sampler is a plain function of a denoiser `model(x, sigma)`:

    images = edm_sampler(denoiser(net, labels), latents, num_steps=18)

`x` is [n, C, H, W] in the dtype of the state, `sigma` a scalar tensor of the same dtype and device, and the result the
denoised image D(x; sigma) in any floating dtype. `latents` are unit Gaussian noise of the shape of the images; the
result has their shape, in [-1, 1] up to overshoot. The state is float64 unless `dtype` says otherwise (Apple GPUs have
no float64). Noise levels and step sizes are computed on the host before the first step: nothing in the loop waits
for the device.

Arguments that all samplers share:
    num_steps    number of noise levels N above zero; 1 is a single Euler step from the largest level.
    limits       (smallest, largest) noise level the network was made for; the range asked for is clipped to it.
    round_sigma  maps noise levels (float64 tensor on the CPU) to the nearest ones that the network knows.
    noise        noise(step) gives the unit Gaussian noise of a stochastic step; only called when S_churn > 0, and then
                 at every step, in order. Default: torch's global generator.

References (arXiv): Karras et al. 2022 (2206.00364); Lu et al. 2022, DPM-Solver++ (2211.01095); Zhang and Chen 2022,
DEIS (2204.13902); Ho and Salimans 2022, classifier-free guidance (2207.12598); Karras et al. 2024, autoguidance
(2406.02507).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from shared.cli import UserError

Model = Callable[[Tensor, Tensor], Tensor]
Rounding = Callable[[Tensor], Tensor]
Noise = Callable[[int], Tensor]

SOLVERS = ("euler", "heun")
DISCRETIZATIONS = ("vp", "ve", "iddpm", "edm")
SCHEDULES = ("vp", "ve", "linear")
SCALINGS = ("vp", "none")
NO_LIMITS = (0.0, math.inf)


def unrounded(sigmas: Tensor) -> Tensor:
    """Leave noise levels as they are: the rounding of a network that knows every level."""
    return sigmas


# ---------------------------------------------------------------- denoisers

def denoiser(net: torch.nn.Module, labels: Tensor | None = None) -> Model:
    """Fix the class labels (float one-hot [n, label_dim], or None) of a preconditioned network."""
    return lambda x, sigma: net(x, sigma, labels)


def guided(model: Model, guide: Model, scale: float) -> Model:
    """Push `model` away from `guide`: D_guide + scale (D_model - D_guide).

    With the same network without labels as the guide this is classifier-free guidance; with a smaller or less trained
    network and the same labels it is autoguidance. A scale of 1 is `model` itself, and then the guide is never called.
    """
    if scale == 1:
        return model

    def combined(x: Tensor, sigma: Tensor) -> Tensor:
        weaker = guide(x, sigma)
        return weaker + scale * (model(x, sigma) - weaker)

    return combined


def affine(model: Model, second: Model, weight: float) -> Model:
    """Push `model` away from `second`: (1 + weight) D_model - weight D_second, both in the dtype of the state.

    With the denoiser of clean classes and the one of noisy labels this is the affine score of "Label-Noise Robust
    Diffusion Models" (Na et al., ICLR 2024). A weight of 0 is `model` itself, and then `second` is never called.
    """
    if weight == 0:
        return model
    return lambda x, sigma: (1 + weight) * model(x, sigma).to(x.dtype) - weight * second(x, sigma).to(x.dtype)


# ---------------------------------------------------------------- EDM

@torch.no_grad()
def edm_sampler(model: Model, latents: Tensor, *, num_steps: int = 18, sigma_min: float = 0.002,
                sigma_max: float = 80.0, rho: float = 7.0, S_churn: float = 0.0, S_min: float = 0.0,
                S_max: float = math.inf, S_noise: float = 1.0, noise: Noise | None = None,
                limits: tuple[float, float] = NO_LIMITS, round_sigma: Rounding = unrounded,
                dtype: torch.dtype = torch.float64) -> Tensor:
    """Sample with the second-order stochastic sampler of Karras et al. 2022 (algorithm 2; algorithm 1 at S_churn = 0).

    Costs 2 num_steps - 1 denoiser calls. S_churn, S_min, S_max, S_noise: amount, range and inflation of fresh noise.
    """
    churn = Churn(S_churn, S_min, S_max, S_noise, num_steps)
    sigmas = round_sigma(edm_sigmas(num_steps, *_clip(sigma_min, sigma_max, limits), rho)).tolist()
    raised = round_sigma(torch.tensor([t * (1 + churn.gamma(t)) for t in sigmas], dtype=torch.float64)).tolist()

    x = latents.to(dtype) * sigmas[0]
    for step, (t, t_hat, t_next) in enumerate(zip(sigmas, raised, [*sigmas[1:], 0.0], strict=True)):
        x_hat = churn.apply(x, step, _root(t_hat**2 - t**2), noise)
        slope = (x_hat - _denoise(model, x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * slope
        if t_next > 0:  # Heun's correction, which the last step cannot have
            slope_next = (x - _denoise(model, x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (slope + slope_next) / 2
    return x


def edm_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Return the noise levels of equation 5, from sigma_max down to sigma_min: float64 [num_steps] on the CPU."""
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


@dataclass(frozen=True)
class Churn:
    """The stochastic part of a step: noise is raised by a factor 1 + gamma, then removed again by the ODE."""

    S_churn: float
    S_min: float
    S_max: float
    S_noise: float
    num_steps: int

    def gamma(self, sigma: float) -> float:
        inside = self.S_min <= sigma <= self.S_max
        return min(self.S_churn / self.num_steps, math.sqrt(2) - 1) if inside else 0.0

    def apply(self, x: Tensor, step: int, amount: float, noise: Noise | None) -> Tensor:
        """Add noise of standard deviation amount * S_noise. Draws even where the amount is 0, as published seeds do."""
        if self.S_churn == 0:
            return x
        fresh = torch.randn_like(x) if noise is None else noise(step).to(x.dtype)
        return x + amount * self.S_noise * fresh


# ---------------------------------------------------------------- ablation: VP, VE, iDDPM and EDM, piece by piece

@torch.no_grad()
def ablation_sampler(model: Model, latents: Tensor, *, num_steps: int = 18, sigma_min: float | None = None,
                     sigma_max: float | None = None, rho: float = 7.0, solver: str = "heun",
                     discretization: str = "edm", schedule: str = "linear", scaling: str = "none",
                     epsilon_s: float = 1e-3, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000, alpha: float = 1.0,
                     S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0,
                     noise: Noise | None = None, limits: tuple[float, float] = NO_LIMITS,
                     round_sigma: Rounding = unrounded, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sample with any combination of solver, time steps, schedule and scaling of table 1 of Karras et al. 2022.

    solver euler | heun; discretization vp | ve | iddpm | edm picks the noise levels; schedule vp | ve | linear is
    sigma(t); scaling vp | none is s(t). alpha is where the second-order solver evaluates again (1 is Heun, 1/2 the
    midpoint). Without sigma_min and sigma_max the range is that of the discretization.
    """
    for name, value, known in (("solver", solver, SOLVERS), ("discretization", discretization, DISCRETIZATIONS),
                               ("schedule", schedule, SCHEDULES), ("scaling", scaling, SCALINGS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    lowest, highest = _default_range(discretization, epsilon_s)
    low, high = _clip(lowest if sigma_min is None else sigma_min, highest if sigma_max is None else sigma_max, limits)
    vp = fitted_vp(low, high, epsilon_s)
    path = {"vp": vp, "ve": VE, "linear": LINEAR}[schedule]
    s, s_deriv = SCALING[scaling]

    if discretization == "edm":
        sigmas = edm_sigmas(num_steps, low, high, rho)
    elif discretization == "vp":
        times = 1 + torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1) * (epsilon_s - 1)
        sigmas = torch.tensor([vp.sigma(t) for t in times.tolist()], dtype=torch.float64)
    elif discretization == "ve":
        sigmas = high * (low / high) ** (torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1))
    else:
        sigmas = iddpm_sigmas(num_steps, low, high, M, C_1, C_2)

    churn = Churn(S_churn, S_min, S_max, S_noise, num_steps)
    times = [path.time(sigma) for sigma in round_sigma(sigmas).tolist()]
    raised = [path.sigma(t) * (1 + churn.gamma(path.sigma(t))) for t in times]
    raised = [path.time(sigma) for sigma in round_sigma(torch.tensor(raised, dtype=torch.float64)).tolist()]

    def slope(x: Tensor, t: float) -> Tensor:
        """dx/dt of the probability-flow ODE (equation 4, with the score written as a denoiser)."""
        sigma, sigma_deriv = path.sigma(t), path.sigma_deriv(t)
        scale, scale_deriv = s(sigma), s_deriv(sigma, sigma_deriv)
        denoised = _denoise(model, x / scale, sigma)
        return (sigma_deriv / sigma + scale_deriv / scale) * x - sigma_deriv * scale / sigma * denoised

    x = latents.to(dtype) * (path.sigma(times[0]) * s(path.sigma(times[0])))
    for step, (t, t_hat, t_next) in enumerate(zip(times, raised, [*times[1:], 0.0], strict=True)):
        sigma, sigma_hat = path.sigma(t), path.sigma(t_hat)
        x_hat = churn.apply(x * (s(sigma_hat) / s(sigma)), step, _root(sigma_hat**2 - sigma**2) * s(sigma_hat), noise)
        h = t_next - t_hat
        first = slope(x_hat, t_hat)
        if solver == "euler" or step == num_steps - 1:
            x = x_hat + h * first
        else:
            second = slope(x_hat + alpha * h * first, t_hat + alpha * h)
            x = x_hat + h * ((1 - 1 / (2 * alpha)) * first + 1 / (2 * alpha) * second)
    return x


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: sigma(t), its derivative, and the time t at which sigma is reached."""

    sigma: Callable[[float], float]
    sigma_deriv: Callable[[float], float]
    time: Callable[[float], float]


def vp_schedule(beta_d: float, beta_min: float) -> Schedule:
    """Variance preserving: sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""
    def sigma(t: float) -> float:
        return math.sqrt(math.exp(0.5 * beta_d * t**2 + beta_min * t) - 1)

    def sigma_deriv(t: float) -> float:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def time(level: float) -> float:
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log(level**2 + 1)) - beta_min) / beta_d

    return Schedule(sigma, sigma_deriv, time)


def fitted_vp(sigma_min: float, sigma_max: float, epsilon_s: float) -> Schedule:
    """Return the VP schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max."""
    beta_d = 2 * (math.log(sigma_min**2 + 1) / epsilon_s - math.log(sigma_max**2 + 1)) / (epsilon_s - 1)
    return vp_schedule(beta_d, math.log(sigma_max**2 + 1) - 0.5 * beta_d)


VE = Schedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda sigma: sigma**2)
LINEAR = Schedule(lambda t: t, lambda t: 1.0, lambda sigma: sigma)

# Name of a scaling -> s(sigma) and ds/dt from sigma and dsigma/dt.
SCALING: dict[str, tuple[Callable[[float], float], Callable[[float, float], float]]] = {
    "vp": (lambda sigma: 1 / math.sqrt(1 + sigma**2),
           lambda sigma, sigma_deriv: -sigma * sigma_deriv / math.sqrt(1 + sigma**2) ** 3),
    "none": (lambda sigma: 1.0, lambda sigma, sigma_deriv: 0.0),
}


def _default_range(discretization: str, epsilon_s: float) -> tuple[float, float]:
    vp = vp_schedule(beta_d=19.9, beta_min=0.1)
    return {"vp": (vp.sigma(epsilon_s), vp.sigma(1.0)), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0),
            "edm": (0.002, 80.0)}[discretization]


def iddpm_sigmas(num_steps: int, sigma_min: float, sigma_max: float, M: int = 1000, C_1: float = 0.001,
                 C_2: float = 0.008) -> Tensor:
    """Return `num_steps` levels of the improved-DDPM table that lie in the range: float64 on the CPU, descending.

    The cumulative alphas are float32 in exactly this order of operations, as in the table published networks were
    trained with; the recursion is float64. Raises UserError when no level lies in the range.
    """
    levels = torch.arange(M + 1)
    alpha_bar = (0.5 * math.pi * levels / M / (C_2 + 1)).sin() ** 2
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=C_1).tolist()
    table = [0.0]
    for j in reversed(range(M)):
        table.append(math.sqrt((table[-1] ** 2 + 1) / ratio[j] - 1))
    inside = [u for u in reversed(table) if sigma_min <= u <= sigma_max]
    if not inside:
        raise UserError(f"no iDDPM noise level lies between {sigma_min:g} and {sigma_max:g}: widen --sigma_min, "
                        "--sigma_max or choose another --disc")
    stride = (len(inside) - 1) / max(num_steps - 1, 1)
    return torch.tensor([inside[round(stride * i)] for i in range(num_steps)], dtype=torch.float64)


# ---------------------------------------------------------------- few steps: one denoiser call each, no retraining

@torch.no_grad()
def dpm_solver_pp_2m(model: Model, latents: Tensor, *, num_steps: int = 18, sigma_min: float = 0.002,
                     sigma_max: float = 80.0, rho: float = 7.0, limits: tuple[float, float] = NO_LIMITS,
                     round_sigma: Rounding = unrounded, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sample with DPM-Solver++(2M), algorithm 2 of Lu et al. 2022: second order, num_steps denoiser calls."""
    sigmas = round_sigma(edm_sigmas(num_steps, *_clip(sigma_min, sigma_max, limits), rho)).tolist()
    x = latents.to(dtype) * sigmas[0]
    before = denoised_before = None
    for sigma, following in pairwise([*sigmas, 0.0]):
        denoised = target = _denoise(model, x, sigma)
        if before is not None and following > 0:
            r = math.log(before / sigma) / math.log(sigma / following)  # ratio of the two steps in log SNR
            target = denoised + (denoised - denoised_before) / (2 * r)
        x = following / sigma * x + (1 - following / sigma) * target
        before, denoised_before = sigma, denoised
    return x


@torch.no_grad()
def deis_sampler(model: Model, latents: Tensor, *, order: int = 3, num_steps: int = 18, sigma_min: float = 0.002,
                 sigma_max: float = 80.0, rho: float = 7.0, limits: tuple[float, float] = NO_LIMITS,
                 round_sigma: Rounding = unrounded, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sample with tAB-DEIS, Adams-Bashforth of `order` 1, 2 or 3 over uneven steps: num_steps denoiser calls.

    The polynomial in sigma through the last `order` slopes (predicted unit noise) is integrated exactly.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order: expected 1, 2 or 3, got {order}")
    sigmas = round_sigma(edm_sigmas(num_steps, *_clip(sigma_min, sigma_max, limits), rho)).tolist()
    x = latents.to(dtype) * sigmas[0]
    history: list[tuple[float, Tensor]] = []  # (sigma, slope), newest first
    for sigma, following in pairwise([*sigmas, 0.0]):
        history = [(sigma, (x - _denoise(model, x, sigma)) / sigma), *history[:order - 1]]
        h = following - sigma
        for weight, (_, slope) in zip(_adams_weights([level for level, _ in history], h), history, strict=True):
            x = x + h * weight * slope
    return x


def _adams_weights(times: Sequence[float], h: float) -> list[float]:
    """Weights of values at `times`, newest first, in the mean over [times[0], times[0] + h] of their polynomial."""
    nodes = (np.array(times) - times[0]) / h
    means = 1 / np.arange(1, len(times) + 1)  # of u^0, u^1, ... over u in [0, 1]
    return np.linalg.solve(np.vander(nodes, increasing=True).T, means).tolist()


# ---------------------------------------------------------------- shared by all

def _denoise(model: Model, x: Tensor, sigma: float) -> Tensor:
    return model(x, torch.full((), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)


def _clip(sigma_min: float, sigma_max: float, limits: tuple[float, float]) -> tuple[float, float]:
    """Clip the range of noise levels to that of the network; UserError if it is empty."""
    low, high = max(sigma_min, float(limits[0])), min(sigma_max, float(limits[1]))
    if not 0 < low <= high:
        raise UserError(f"no noise levels left: --sigma_min={sigma_min:g} and --sigma_max={sigma_max:g} within the "
                        f"network's own range {float(limits[0]):g} to {float(limits[1]):g}")
    return low, high


def _root(variance: float) -> float:
    return math.sqrt(max(variance, 0.0))
