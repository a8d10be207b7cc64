"""The two noise schedules of the latent diffusion models, as training sees them: x_t = sqrt(a) x_0 + sqrt(1 - a) noise.

    ContinuousSchedule   the variance-preserving SDE (Song et al. 2021, arXiv 2011.13456), t in [0, 1)
    DiscreteSchedule     Stable Diffusion's 1000 steps (Rombach et al. 2022, arXiv 2112.10752), n in 1..1000
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from shared.cli import UserError
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng, torch_rng

Model = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, S, S], network time [N]) -> the network's output


def wide(values: Tensor, like: Tensor) -> Tensor:
    """Return [N] as [N, 1, 1, 1], in the dtype of `like`."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class ContinuousSchedule:
    """beta(t) = beta_min + (beta_max - beta_min) t. Functions of t take and return floating tensors [N].

    pred: meaning of the network's output, noise_pred or x0_pred.
    """

    name, time_scale = "continuous", 999.0

    def __init__(self, pred: str = "noise_pred", beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if pred not in ("noise_pred", "x0_pred"):
            raise UserError(f"--config.pred={pred}: expected noise_pred or x0_pred")
        self.pred, self.beta_min, self.beta_max = pred, beta_min, beta_max

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t: Tensor) -> Tensor:
        """Return the integral of beta from 0 to t."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Return the squared factor of the image."""
        return torch.exp(-self.integral(t))

    def variance(self, t: Tensor) -> Tensor:
        """Return the variance of the noise, 1 - alpha_bar."""
        return -torch.expm1(-self.integral(t))

    def noise_to_signal(self, t: Tensor) -> Tensor:
        return torch.expm1(self.integral(t))

    def draw(self, seed: int, step: int, count: int, device: torch.device) -> Tensor:
        """Return uniform times in [0, 1) for a global batch: float32 [count]."""
        return torch.rand(count, generator=torch_rng(seed, step, "time", device), device=device)

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return wide(self.alpha_bar(t).sqrt(), x0) * x0 + wide(self.variance(t).sqrt(), x0) * noise

    def network_time(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def noise_prediction(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise predicted by the network's output at (x, t)."""
        if self.pred == "noise_pred":
            return output
        ratio, deviation = self.noise_to_signal(t), self.variance(t).sqrt()
        return x / wide(deviation, x) - output * wide(ratio.rsqrt(), x)

    def x0_prediction(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the image that follows from a prediction of the noise in x."""
        return x / wide(self.alpha_bar(t).sqrt(), x) - wide(self.noise_to_signal(t).sqrt(), x) * noise

    def score(self, noise: Tensor, t: Tensor) -> Tensor:
        return -noise / wide(self.variance(t).sqrt(), noise)

    def ode(self, model: Model, x: Tensor, steps: int) -> Iterator[Tensor]:
        """Yield the states of the probability-flow ODE by Euler's method, from x at t = 1 to t = 0, x left out.

        Times are 0 and `steps` equally spaced ones from 1e-3 to 1, as for the published previews.
        """
        times = [0.0, *np.linspace(1e-3, 1.0, steps).tolist()]
        with torch.no_grad():
            for later, earlier in pairwise(reversed(times)):
                t = torch.full((len(x),), later, dtype=x.dtype, device=x.device)
                noise = self.noise_prediction(model(x, self.network_time(t)), x, t)
                drift = -0.5 * wide(self.beta(t), x) * (x + self.score(noise, t))
                x = x + drift * (earlier - later)
                yield x


class DiscreteSchedule:
    """betas, alpha_bars: float64 [steps + 1] by n; beta_0 = 0. The square roots of betas are equally spaced."""

    name, pred = "discrete", "noise_pred"

    def __init__(self, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> None:
        self.steps = steps
        self.betas = np.append(0.0, np.linspace(start**0.5, end**0.5, steps) ** 2)
        self.alpha_bars = np.cumprod(1 - self.betas)
        self._factors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def draw(self, seed: int, step: int, count: int, device: torch.device) -> Tensor:
        """Return uniform steps in 1..steps for a global batch: int64 [count]."""
        return to_device(numpy_rng(seed, step, "time").integers(1, self.steps + 1, count), device)

    def noised(self, x0: Tensor, n: Tensor, noise: Tensor) -> Tensor:
        if x0.device not in self._factors:  # computed in float64, used in float32
            self._factors[x0.device] = tuple(to_device(values.astype(np.float32), x0.device) for values in (
                np.sqrt(self.alpha_bars), np.sqrt(1 - self.alpha_bars)))
        image, deviation = self._factors[x0.device]
        return wide(image[n], x0) * x0 + wide(deviation[n], x0) * noise

    def network_time(self, n: Tensor) -> Tensor:
        return n


Schedule = ContinuousSchedule | DiscreteSchedule


def losses(schedule: Schedule, model: Model, x0: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of the predicted noise or image, for each image: float32 [N].

    times: of `schedule.draw`.
    """
    output = model(schedule.noised(x0, times, noise), schedule.network_time(times)).to(x0.dtype)
    target = noise if schedule.pred == "noise_pred" else x0
    return (target - output).square().flatten(1).mean(1)
