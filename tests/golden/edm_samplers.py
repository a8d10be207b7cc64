"""EDM's sampler and the ablation sampler on analytic denoisers, with the noises given."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from EDM.sampling.samplers import ablation_sampler, edm_sampler, unrounded
from tests.golden.cases import arrays, index

SAMPLERS = {"edm_sampler": edm_sampler, "ablation_sampler": ablation_sampler}
DENOISERS = {
    "linear": lambda x, sigma: x / (1 + sigma**2),
    "tanh": lambda x, sigma: 0.5 * torch.tanh(2 * x / (1 + sigma**2)),
}


def sampler_cases() -> list[dict[str, Any]]:
    return [case for case in index("edm")["cases"] if case["kind"] == "sampler"]


CASES = {case["case"] for case in sampler_cases()} | {"sampler_notes"}


def nearest_on_grid(sigmas: torch.Tensor) -> torch.Tensor:
    """The rounding called grid64: the nearest of 64 geometric levels and zero, first on ties."""
    grid = torch.from_numpy(np.concatenate([np.geomspace(90, 0.0015, 64), [0]]))
    return grid[(sigmas.reshape(-1, 1) - grid).abs().argmin(dim=1)].reshape(sigmas.shape)


ROUNDINGS = {"identity": unrounded, "grid64": nearest_on_grid}


@pytest.mark.parametrize("case", sampler_cases(), ids=lambda case: case["case"])
def test_trajectory(case: dict[str, Any]) -> None:
    expected = {name.removeprefix(case["case"] + "/"): value for name, value in arrays("edm", case["file"]).items()
                if name.startswith(case["case"] + "/")}
    rng = np.random.default_rng(case["seed"])
    latents = torch.from_numpy(rng.standard_normal(case["shape"]).astype(np.float32))
    options = {name: float(value) if value == "inf" else value for name, value in case["options"].items()}
    num_steps = options.get("num_steps", 18)
    noises = torch.from_numpy(rng.standard_normal((num_steps, *case["shape"])))
    levels, inputs, drawn = [], [], []

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert x.dtype == sigma.dtype == torch.float64
        levels.append(sigma.item())
        inputs.append(x.to(torch.float32).numpy())
        return DENOISERS[case["denoiser"]](x, sigma)

    def noise(step: int) -> torch.Tensor:
        drawn.append(step)
        return noises[step]

    limits = tuple(float(case["net_limits"][name]) for name in ("sigma_min", "sigma_max"))
    images = SAMPLERS[case["function"]](model, latents, noise=noise, limits=limits,
                                        round_sigma=ROUNDINGS[case["round_sigma"]], **options).numpy()

    tolerance = case["tolerance"]
    assert len(levels) == case["network_calls"]
    assert np.abs(levels - expected["sigmas"]).max() <= tolerance["sigmas_absolute"]
    assert np.abs(images - expected["out"]).max() <= tolerance["out_relative"] * np.abs(expected["out"]).max()
    if "x_calls" in expected:
        error = np.abs(np.stack(inputs) - expected["x_calls"]).max(axis=(1, 2, 3, 4))
        scale = np.abs(expected["x_calls"]).max(axis=(1, 2, 3, 4))
        assert (error <= max(tolerance["out_relative"], 2e-6) * scale).all()
    # The published samplers draw at every step; draws that nothing depends on are left out here.
    assert len(drawn) == (case["noise_draws"] if options.get("S_churn", 0) else 0)
    assert math.isfinite(images.sum())
