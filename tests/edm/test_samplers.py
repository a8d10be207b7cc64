"""Properties of the samplers on denoisers whose trajectories are known exactly."""
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from EDM.sampling import samplers
from EDM.sampling.samplers import (
    ablation_sampler,
    deis_sampler,
    dpm_solver_pp_2m,
    edm_sampler,
    edm_sigmas,
    guided,
    iddpm_sigmas,
)
from shared.cli import UserError

DATA_STD = 0.5


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The ideal denoiser of data from N(0, DATA_STD^2); its ODE has the closed solution of `exact`."""
    return x * DATA_STD**2 / (DATA_STD**2 + sigma**2)


def exact(latents: torch.Tensor, sigma_max: float) -> torch.Tensor:
    """Follow the ODE of `gaussian` from sigma_max to 0."""
    return latents.double() * sigma_max * DATA_STD / math.hypot(DATA_STD, sigma_max)


def noise_at(latents: torch.Tensor) -> Callable[[int], torch.Tensor]:
    return lambda step: torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def steps_counted(model: Callable, calls: list[float]) -> Callable:
    def counted(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(float(sigma))
        return model(x, sigma)
    return counted


LATENTS = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

FEW_STEPS = {
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "deis_2": lambda *a, **k: deis_sampler(*a, order=2, **k),
    "deis_3": lambda *a, **k: deis_sampler(*a, order=3, **k),
}


@settings(max_examples=20, deadline=None)
@given(num_steps=st.integers(1, 12), rho=st.floats(1, 10), S_churn=st.floats(0, 20), S_noise=st.floats(0.9, 1.1),
       low=st.floats(0.001, 0.1), high=st.floats(5, 100))
def test_ablation_with_edm_options_is_the_edm_sampler(num_steps, rho, S_churn, S_noise, low, high) -> None:
    options = dict(num_steps=num_steps, rho=rho, S_churn=S_churn, S_min=0.05, S_max=50, S_noise=S_noise,
                   sigma_min=low, sigma_max=high, noise=noise_at(LATENTS))
    ours = edm_sampler(gaussian, LATENTS, **options)
    pieces = ablation_sampler(gaussian, LATENTS, solver="heun", discretization="edm", schedule="linear",
                              scaling="none", **options)
    assert torch.allclose(ours, pieces, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "order"), [("dpm_solver_pp_2m", 2), ("deis_2", 2), ("deis_3", 3)])
def test_order_of_convergence(name: str, order: int) -> None:
    errors = []
    for num_steps in (32, 64, 128):
        images = FEW_STEPS[name](gaussian, LATENTS, num_steps=num_steps, sigma_min=1e-4, sigma_max=10, rho=7)
        errors.append((images - exact(LATENTS, 10)).abs().max().item())
    rates = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert all(rate > order - 0.35 for rate in rates), (errors, rates)


def test_heun_is_second_order_and_euler_first() -> None:
    def rate(sampler: Callable, **options) -> float:
        errors = [(sampler(gaussian, LATENTS, num_steps=n, sigma_min=1e-4, sigma_max=10, **options)
                   - exact(LATENTS, 10)).abs().max() for n in (64, 128)]
        return math.log2(errors[0] / errors[1])
    assert rate(edm_sampler) > 1.8
    assert 0.8 < rate(ablation_sampler, solver="euler") < 1.3


@pytest.mark.parametrize("name", FEW_STEPS)
def test_few_step_samplers_call_the_denoiser_once_a_step(name: str) -> None:
    calls: list[float] = []
    FEW_STEPS[name](steps_counted(gaussian, calls), LATENTS, num_steps=7)
    assert calls == edm_sigmas(7, 0.002, 80).tolist()


@pytest.mark.parametrize("name", FEW_STEPS)
def test_few_step_samplers_beat_euler_at_equal_cost(name: str) -> None:
    reference = exact(LATENTS, 80)
    error = (FEW_STEPS[name](gaussian, LATENTS, num_steps=18) - reference).abs().max()
    euler = (ablation_sampler(gaussian, LATENTS, num_steps=18, solver="euler") - reference).abs().max()
    assert error < 0.6 * euler


@pytest.mark.parametrize("sampler", [edm_sampler, ablation_sampler, *FEW_STEPS.values()])
def test_one_step_is_the_denoised_latent(sampler: Callable) -> None:
    images = sampler(gaussian, LATENTS, num_steps=1, sigma_max=20)
    x = LATENTS.double() * 20
    assert torch.allclose(images, gaussian(x, torch.tensor(20.0)), rtol=1e-12)


def test_noise_is_drawn_only_for_stochastic_steps_and_then_at_every_step() -> None:
    drawn: list[int] = []

    def noise(step: int) -> torch.Tensor:
        drawn.append(step)
        return torch.zeros_like(LATENTS)

    edm_sampler(gaussian, LATENTS, num_steps=5, noise=noise)
    assert drawn == []
    edm_sampler(gaussian, LATENTS, num_steps=5, S_churn=1, S_min=1, S_max=2, noise=noise)
    assert drawn == [0, 1, 2, 3, 4]


def test_churned_samples_keep_the_data_spread() -> None:
    latents = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    images = edm_sampler(gaussian, latents, num_steps=256, S_churn=40)
    assert images.std().item() == pytest.approx(DATA_STD, rel=0.03)


def test_state_is_float64_whatever_the_denoiser_returns() -> None:
    images = edm_sampler(lambda x, sigma: gaussian(x, sigma).bfloat16(), LATENTS, num_steps=3)
    assert images.dtype == torch.float64
    images = edm_sampler(gaussian, LATENTS, num_steps=3, dtype=torch.float32)
    assert images.dtype == torch.float32


def test_range_is_clipped_to_the_network() -> None:
    calls: list[float] = []
    edm_sampler(steps_counted(gaussian, calls), LATENTS, num_steps=4, limits=(0.1, 10))
    assert (max(calls), min(calls)) == (pytest.approx(10), pytest.approx(0.1))
    with pytest.raises(UserError, match="--sigma_min"):
        edm_sampler(gaussian, LATENTS, limits=(0.1, 10), sigma_min=20.0)


def test_iddpm_levels_descend_within_the_range() -> None:
    sigmas = iddpm_sigmas(50, 0.002, 81)
    assert (sigmas.diff() < 0).all()
    assert 0.002 <= sigmas[-1] and sigmas[0] <= 81
    with pytest.raises(UserError, match="iDDPM"):
        iddpm_sigmas(5, 1e-6, 1e-5)


def test_guidance() -> None:
    def never(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the guide is not needed")

    x, sigma = LATENTS.double(), torch.tensor(1.0)
    assert guided(gaussian, never, 1) is gaussian
    assert torch.equal(guided(gaussian, lambda x, s: 0 * x, 2.5)(x, sigma), 2.5 * gaussian(x, sigma))
    assert torch.allclose(guided(gaussian, gaussian, 3.0)(x, sigma), gaussian(x, sigma))


def test_guidance_moves_samples_away_from_the_guide() -> None:
    def around(mean: float) -> Callable:
        return lambda x, sigma: mean + gaussian(x - mean, sigma)

    plain = edm_sampler(around(1.0), LATENTS)
    pushed = edm_sampler(guided(around(1.0), around(0.0), 2.0), LATENTS)
    assert pushed.mean() > plain.mean() + 0.5


def test_unknown_piece_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule"):
        ablation_sampler(gaussian, LATENTS, schedule="cosine")
    assert set(samplers.SCALING) == set(samplers.SCALINGS)
