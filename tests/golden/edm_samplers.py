"""EDM's sampler and the ablation sampler on analytic denoisers, with the noises given."""
from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from EDM.sampling.samplers import ablation_sampler, edm_sampler, unrounded
from tests.golden.cases import NUMBER, arrays, each, serves
from tests.golden.edm_cases import PAPER, cases
from tests.golden.recipes import computed

SAMPLERS = {"edm_sampler": edm_sampler, "ablation_sampler": ablation_sampler}
SAMPLER_CASES, NOTES = cases(kind="sampler"), cases(kind="note")
SERVES = serves(SAMPLER_CASES, NOTES)
# What the notes say, where a set has none.
DENOISERS = {"linear": "x/(1+sigma^2)", "tanh": "0.5*tanh(2x/(1+sigma^2))"}
GRIDS = {"grid64": ("90", "0.0015", "64")}


def denoiser_of(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the denoiser of a name, whose formula the notes give as "NAME: D=...;"."""
    found = [match[1] for case in NOTES if (match := re.search(rf"{name}: D=([^;]+)", case["text"]))]
    formula = (found or [DENOISERS[name]])[0]
    formula = re.sub(r"(\d)(?=[a-z(])", r"\1*", formula.replace("^", "**"))
    functions = {function: getattr(torch, function) for function in ("tanh", "sin", "cos", "exp", "sqrt")}
    return lambda x, sigma: computed(formula, x=x, sigma=sigma, **functions)


def rounding_of(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the rounding of a name: the nearest of some geometric levels and zero, the first on ties."""
    if name == "identity":
        return unrounded
    found = [match.groups() for case in NOTES if (match := re.search(
        rf"{name} rounding:[^;]*?geomspace\({NUMBER}, ?{NUMBER}, ?{NUMBER}\)", case["text"]))]
    high, low, count = (found or [GRIDS[name]])[0]
    grid = torch.from_numpy(np.concatenate([np.geomspace(float(high), float(low), int(count)), [0]]))
    return lambda sigmas: grid[(sigmas.reshape(-1, 1) - grid).abs().argmin(dim=1)].reshape(sigmas.shape)


@each(SAMPLER_CASES)
def test_trajectory(case: dict[str, Any]) -> None:
    expected = {name.removeprefix(case["case"] + "/"): value for name, value in arrays(PAPER, case["file"]).items()
                if name.startswith(case["case"] + "/")}
    rng = np.random.default_rng(case["seed"])
    latents = torch.from_numpy(rng.standard_normal(case["shape"]).astype(np.float32))
    options = {name: float(value) if value == "inf" else value for name, value in case["options"].items()}
    sampler = SAMPLERS[case["function"]]
    num_steps = options.get("num_steps", inspect.signature(sampler).parameters["num_steps"].default)
    denoise = denoiser_of(case["denoiser"])
    noises = torch.from_numpy(rng.standard_normal((num_steps, *case["shape"])))
    levels, inputs, drawn = [], [], []

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert x.dtype == sigma.dtype == torch.float64
        levels.append(sigma.item())
        inputs.append(x.to(torch.float32).numpy())
        return denoise(x, sigma)

    def noise(step: int) -> torch.Tensor:
        drawn.append(step)
        return noises[step]

    limits = tuple(float(case["net_limits"][name]) for name in ("sigma_min", "sigma_max"))
    images = sampler(model, latents, noise=noise, limits=limits, round_sigma=rounding_of(case["round_sigma"]),
                     **options).numpy()

    tolerance = case["tolerance"]
    assert len(levels) == case["network_calls"]
    if not expected:
        pytest.skip("there are no arrays")
    assert np.abs(levels - expected["sigmas"]).max() <= tolerance["sigmas_absolute"]
    assert np.abs(images - expected["out"]).max() <= tolerance["out_relative"] * np.abs(expected["out"]).max()
    if "x_calls" in expected:
        wanted = expected["x_calls"].reshape(len(inputs), -1)
        error = np.abs(np.stack(inputs).reshape(wanted.shape) - wanted).max(axis=1)
        assert (error <= max(tolerance["out_relative"], 2e-6) * np.abs(wanted).max(axis=1)).all()
    # The published samplers draw at every step; draws that nothing depends on are left out here.
    assert len(drawn) == (case["noise_draws"] if options.get("S_churn", 0) else 0)
    assert math.isfinite(images.sum())
