"""DPM-Solver with the third-order "fast" plan, by the number of network calls.

    latents = dpm_solver(guided(net, labels, 0.4, none), noise, 50)              # of the continuous schedule
    latents = dpm_solver_pp(guided(net, labels, 0.4, none), noise, 50, path)     # of the discrete one

The first predicts noise over uniform log-SNR (Lu et al. 2022, arXiv 2206.00927), the second data over uniform time
(DPM-Solver++, arXiv 2211.01095). A model is (x [N, C, S, S], network time [N]) -> noise [N, C, S, S]. The schedule is
computed on the host in the dtype of `path`, float64 or, as published, float32: no step waits for the device.
"""
from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from EDM.latent.schedules import Model
from shared.cli import UserError


class Point(NamedTuple):
    """A noise level, x = alpha x_0 + sigma noise, as scalars on the host; level is log(alpha / sigma)."""

    t: Tensor
    log_alpha: Tensor
    alpha: Tensor
    sigma: Tensor
    level: Tensor


class Path:
    """A noise schedule as samplers see it: noise levels by time and times by level, tensors on the host.

    dtype: of all numbers. Derived classes give log_alpha(t), inverse(level) and time_scale, the network's time at 1.
    """

    time_scale: float

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse(self, level: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - torch.exp(2 * self.log_alpha(t)))

    def level(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(1 - torch.exp(2 * log_alpha))

    def at(self, t: Tensor) -> Point:
        """Return the noise level at time t."""
        log_alpha = self.log_alpha(t)
        return Point(t, log_alpha, log_alpha.exp(), self.sigma(t), self.level(t))

    def at_level(self, level: Tensor) -> Point:
        return self.at(self.inverse(level))

    def spaced(self, first: Tensor | float, last: Tensor | float, count: int) -> Tensor:
        """Return `count` equally spaced numbers."""
        return torch.linspace(float(first), float(last), count, dtype=self.dtype)


class ContinuousPath(Path):
    """The variance-preserving SDE with beta from 0.1 to 20."""

    time_scale = 999.0
    beta_min, slope = 0.1, 19.9

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * self.slope - 0.5 * t * self.beta_min

    def inverse(self, level: Tensor) -> Tensor:
        u = 2 * self.slope * torch.logaddexp(-2 * level, torch.zeros_like(level))
        return u / (torch.sqrt(self.beta_min**2 + u) + self.beta_min) / self.slope


class DiscretePath(Path):
    """Steps n = 1..N with these betas (float64 [N + 1], beta_0 = 0), at t = n / N; log alpha is linear in between."""

    def __init__(self, betas: np.ndarray, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        count = len(betas) - 1
        self.time_scale = float(count)
        self.times = torch.linspace(0, 1, count + 1, dtype=dtype)[1:]
        self.log_alphas = 0.5 * torch.log(1 - torch.from_numpy(betas[1:]).to(dtype)).cumsum(0)

    def log_alpha(self, t: Tensor) -> Tensor:
        return _linear(t, self.times, self.log_alphas)

    def inverse(self, level: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.logaddexp(torch.zeros_like(level), -2 * level)
        return _linear(log_alpha, self.log_alphas.flip(0), self.times.flip(0))


def _linear(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Interpolate linearly between points with rising xs; the outermost segments are prolonged."""
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    return ys[left] + (x - xs[left]) * (ys[right] - ys[left]) / (xs[right] - xs[left])


def orders(calls: int) -> list[int]:
    """Return the orders of the steps whose sum is `calls`: threes, then the rest."""
    if calls < 1:
        raise UserError(f"--config.sample.sample_steps={calls}: expected at least 1 network call")
    threes = calls // 3
    return {0: [3] * (threes - 1) + [2, 1], 1: [3] * threes + [1], 2: [3] * threes + [2]}[calls % 3]


# ---------------------------------------------------------------- models

def guided(net: torch.nn.Module, labels: Tensor | None, scale: float, none_label: int) -> Model:
    """Return the noise prediction pushed away from that without class: c + scale (c - u) (arXiv 2207.12598).

    scale <= 0: the prediction with class alone, one network call in place of two.
    """
    if scale <= 0 or labels is None:
        return lambda x, time: net(x, time, labels).to(x.dtype)
    both = torch.cat([labels, torch.full_like(labels, none_label)])

    def model(x: Tensor, time: Tensor) -> Tensor:
        with_class, without = net(torch.cat([x, x]), torch.cat([time, time]), both).to(x.dtype).chunk(2)
        return with_class + scale * (with_class - without)

    return model


def _call(model: Model, x: Tensor, point: Point, path: Path) -> Tensor:
    return model(x, torch.full((len(x),), float(path.time_scale * point.t), dtype=x.dtype, device=x.device))


# ---------------------------------------------------------------- noise prediction over uniform log-SNR

@torch.no_grad()
def dpm_solver(model: Model, x: Tensor, calls: int, path: Path | None = None, end: float = 1e-4, start: float = 1.0
               ) -> Tensor:
    """Return the sample at time `end` from x [N, C, S, S], standard normal, at time `start`."""
    path = path or ContinuousPath()
    plan = orders(calls)
    for order, (s, t) in zip(plan, pairwise(noise_times(path, len(plan), start, end)), strict=True):
        x = _noise_step(model, x, path.at(s), path.at(t), order, path)
    return x


def noise_times(path: Path, steps: int, start: float = 1.0, end: float = 1e-4) -> Tensor:
    """Return the steps' boundaries [steps + 1], equally spaced in log-SNR."""
    first, last = path.level(torch.tensor([start, end], dtype=path.dtype))
    return path.inverse(path.spaced(first, last, steps + 1))


def _noise_step(model: Model, x: Tensor, s: Point, t: Point, order: int, path: Path) -> Tensor:
    h = t.level - s.level
    noise = _call(model, x, s, path)

    def ratio(point: Point) -> float:
        return float(torch.exp(point.log_alpha - s.log_alpha))

    first = ratio(t) * x - float(t.sigma * torch.expm1(h)) * noise
    if order == 1:
        return first
    r = 1 / 2 if order == 2 else 1 / 3
    middle = path.at_level(s.level + r * h)
    inner = ratio(middle) * x - float(middle.sigma * torch.expm1(r * h)) * noise
    change = _call(model, inner, middle, path) - noise
    if order == 2:
        return first - float(t.sigma * torch.expm1(h) / (2 * r)) * change
    r2 = 2 / 3
    late = path.at_level(s.level + r2 * h)
    inner = (ratio(late) * x - float(late.sigma * torch.expm1(r2 * h)) * noise
             - float(r2 / r * late.sigma * (torch.expm1(r2 * h) / (r2 * h) - 1)) * change)
    change = _call(model, inner, late, path) - noise
    return first - float(t.sigma * (torch.expm1(h) / h - 1) / r2) * change


# ---------------------------------------------------------------- data prediction over uniform time

@torch.no_grad()
def dpm_solver_pp(model: Model, x: Tensor, calls: int, path: Path, end: float = 1e-3, start: float = 1.0) -> Tensor:
    """Return the sample at time `end` from x [N, C, S, S], standard normal, at time `start`."""
    plan, times = orders(calls), data_times(path, calls, start, end)
    for order, index in zip(plan, accumulate(plan, initial=0), strict=False):
        points = [path.at(t) for t in times[index:index + order + 1]]
        x = _data_step(model, x, points, path)
    return x


def data_times(path: Path, calls: int, start: float = 1.0, end: float = 1e-3) -> Tensor:
    """Return the times [calls + 1], equally spaced; a step of order p spans p of the intervals."""
    return path.spaced(start, end, calls + 1)


def _data_step(model: Model, x: Tensor, points: list[Point], path: Path) -> Tensor:
    """Take a step of order len(points) - 1 from the first point to the last."""
    s, t = points[0], points[-1]
    h, order = t.level - s.level, len(points) - 1

    def data(x: Tensor, point: Point) -> Tensor:
        return (x - float(point.sigma) * _call(model, x, point, path)) / float(point.alpha)

    x0 = data(x, s)
    first = float(t.sigma / s.sigma) * x - float(t.alpha * torch.expm1(-h)) * x0
    if order == 1:
        return first
    r = (points[1].level - s.level) / h
    middle = path.at_level(s.level + r * h)
    inner = float(middle.sigma / s.sigma) * x - float(middle.alpha * torch.expm1(-r * h)) * x0
    change = data(inner, middle) - x0
    if order == 2:
        return first - float(t.alpha * torch.expm1(-h) / (2 * r)) * change
    r2 = (points[2].level - s.level) / h
    late = path.at_level(s.level + r2 * h)
    inner = (float(late.sigma / s.sigma) * x - float(late.alpha * torch.expm1(-r2 * h)) * x0
             + float(r2 / r * late.alpha * (torch.expm1(-r2 * h) / (r2 * h) + 1)) * change)
    change = data(inner, late) - x0
    return first + float(t.alpha * (torch.expm1(-h) / h + 1) / r2) * change
