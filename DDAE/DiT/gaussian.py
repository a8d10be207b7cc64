"""Gaussian diffusion with a linear schedule, on all of its steps or on some ("respaced"), as DiT is trained with.

Ho et al. 2020 (arXiv 2006.11239) for the process, Nichol and Dhariwal 2021 (arXiv 2102.09672) for learned variances,
the hybrid loss and respacing, Song et al. 2021 (arXiv 2010.02502) for DDIM. Steps are counted from 0.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shared.cli import UserError
from shared.training.precision import to_device

BASE_STEPS = 1000
Model = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, ...], base step int64 [N]) -> [N, 2C, ...]: noise, variance


def kept_steps(respacing: str, base_steps: int = BASE_STEPS) -> list[int]:
    """Return the base steps that remain, ascending.

    "": all. "ddimN": every s-th step, s being the smallest stride that leaves exactly N. "a,b,...": the steps cut into
    as many consecutive sections (longer ones first), with a, b, ... steps evenly spread over each. UserError where
    that cannot be.
    """
    if not respacing:
        return list(range(base_steps))
    try:
        if respacing.startswith("ddim"):
            return _strided(int(respacing.removeprefix("ddim")), base_steps)
        counts = [int(part) for part in respacing.split(",")]
    except ValueError:
        raise UserError(f"respacing {respacing!r}: expected numbers such as 250 or 10,15,20, or ddim50") from None
    size, longer = divmod(base_steps, len(counts))
    steps, start = [], 0
    for number, count in enumerate(counts):
        length = size + (number < longer)
        if not 1 <= count <= length:
            raise UserError(f"respacing {respacing!r}: a section of {length} steps cannot keep {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride  # added up, as published, which decides where a tie is rounded to
        start += length
    return steps


def _strided(count: int, base_steps: int) -> list[int]:
    for stride in range(1, base_steps + 1):
        if len(range(0, base_steps, stride)) == count:
            return list(range(0, base_steps, stride))
    raise UserError(f"respacing ddim{count}: no whole stride leaves {count} of {base_steps} steps")


class SpacedDiffusion:
    """Schedule, loss and samplers. All tables are float64 arrays by index of the kept steps.

    timestep_map: int64, the base step of each index, the network's time input.
    """

    def __init__(self, respacing: str = "", base_steps: int = BASE_STEPS) -> None:
        base = np.cumprod(1 - np.linspace(1e-4, 0.02, base_steps, dtype=np.float64))
        self.timestep_map = np.array(kept_steps(respacing, base_steps))
        alphabar = base[self.timestep_map]
        self.alphabar_prev = np.append(1.0, alphabar[:-1])
        self.betas = 1 - alphabar / self.alphabar_prev
        self.alphabar = alphabar
        self.sqrt_alphabar, self.sqrt_one_minus_alphabar = np.sqrt(alphabar), np.sqrt(1 - alphabar)
        # q(x_{t-1} | x_t, x_0), arXiv 2006.11239 equations 6 and 7.
        self.posterior_variance = self.betas * (1 - self.alphabar_prev) / (1 - alphabar)
        floor = self.posterior_variance[1] if len(alphabar) > 1 else self.betas[0]
        self.posterior_log_variance = np.log(np.append(floor, self.posterior_variance[1:]))  # that of index 0 is 0
        self.posterior_mean_x0 = self.betas * np.sqrt(self.alphabar_prev) / (1 - alphabar)
        self.posterior_mean_xt = (1 - self.alphabar_prev) * np.sqrt(1 - self.betas) / (1 - alphabar)

    def __len__(self) -> int:
        return len(self.timestep_map)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t of x0 [N, ...] at indices t int64 [N]."""
        return _at(self.sqrt_alphabar, t, x0) * x0 + _at(self.sqrt_one_minus_alphabar, t, x0) * noise

    def predict(self, model: Model, x: Tensor, t: Tensor, clip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return (mean, log variance of p(x_{t-1} | x_t), predicted x0), all of the shape of x."""
        out = model(x, to_device(self.timestep_map, t.device)[t])
        return self._moments(out, x, t, clip)

    def _moments(self, out: Tensor, x: Tensor, t: Tensor, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
        noise, variance = out.chunk(2, dim=1)
        fraction = (variance + 1) / 2
        log_variance = (fraction * _at(np.log(self.betas), t, x)
                        + (1 - fraction) * _at(self.posterior_log_variance, t, x))
        x0 = (x - _at(self.sqrt_one_minus_alphabar, t, x) * noise) / _at(self.sqrt_alphabar, t, x)
        x0 = x0.clamp(-1, 1) if clip else x0
        return self._posterior_mean(x0, x, t), log_variance, x0

    def _posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return _at(self.posterior_mean_x0, t, x) * x0 + _at(self.posterior_mean_xt, t, x) * x

    def losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return `loss` = `mse` + `vb`, each [N]: the error of the noise, and the variational bound in bits.

        The bound trains the variance alone: the noise inside it has no gradient.
        """
        x = self.q_sample(x0, t, noise)
        out = model(x, to_device(self.timestep_map, t.device)[t])
        predicted, variance = out.chunk(2, dim=1)
        mean, log_variance, _ = self._moments(torch.cat([predicted.detach(), variance], dim=1), x, t, clip=False)
        truth, true_log_variance = self._posterior_mean(x0, x, t), _at(self.posterior_log_variance, t, x)
        kl = 0.5 * (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
                    + (truth - mean).square() * (-log_variance).exp())
        first = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        bound = torch.where(_wide(t == 0, x), first, kl).flatten(1).mean(1) / math.log(2)
        error = (noise - predicted).square().flatten(1).mean(1)
        return {"loss": error + bound, "mse": error, "vb": bound}

    @torch.no_grad()
    def ancestral(self, model: Model, x: Tensor, noise: Sequence[Tensor] | Callable[[int], Tensor],
                  clip: bool = True) -> Tensor:
        """Sample x0 from x = x_T [N, ...]. noise: that of the k-th step, k = 0..len - 1; the last is not used."""
        draw = noise if callable(noise) else noise.__getitem__
        for k, index in enumerate(reversed(range(len(self)))):
            mean, log_variance, _ = self.predict(model, x, torch.full((len(x),), index, device=x.device), clip)
            x = mean + (0.5 * log_variance).exp() * draw(k) if index else mean
        return x

    @torch.no_grad()
    def ddim(self, model: Model, x: Tensor, eta: float = 0.0, clip: bool = False,
             noise: Callable[[int], Tensor] | None = None) -> Tensor:
        """Sample x0 from x = x_T [N, ...] by DDIM; `noise` is needed for eta > 0."""
        for k, index in enumerate(reversed(range(len(self)))):
            _, _, x0 = self.predict(model, x, torch.full((len(x),), index, device=x.device), clip)
            bar, previous = float(self.alphabar[index]), float(self.alphabar_prev[index])
            epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
            sigma = eta * math.sqrt((1 - previous) / (1 - bar)) * math.sqrt(1 - bar / previous)
            x = math.sqrt(previous) * x0 + math.sqrt(max(0.0, 1 - previous - sigma**2)) * epsilon
            if sigma and index:
                x = x + sigma * noise(k)
        return x


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log-probability of 8-bit values x in [-1, 1] under a Gaussian cut into 256 bins, open at both ends."""
    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = (-log_scale).exp()
    upper, lower = cdf((x - mean + 1 / 255) * inverse), cdf((x - mean - 1 / 255) * inverse)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _at(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """Return table[t] as float32, shaped to multiply `like`."""
    return _wide(to_device(table, t.device)[t].float(), like)
