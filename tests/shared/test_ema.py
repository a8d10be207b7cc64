"""Averages of weights against float64, for a plain, a compiled and a data-parallel network."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shared.distributed import unwrap
from shared.training.ema import EMA, half_life_beta, power_law_beta, power_law_exponent

STEPS, BATCH = 1000, 512
SCHEDULES = {
    "half-life": lambda nimg: half_life_beta(BATCH, 20_000, nimg, 0.05),
    "power law": lambda nimg: power_law_beta(BATCH, nimg, 0.1),
}


@pytest.fixture(scope="module")
def one_rank_group(tmp_path_factory: pytest.TempPathFactory):
    """DistributedDataParallel as several ranks use it, in a group of one."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def follow(model: torch.nn.Module, net: torch.nn.Module, schedule) -> float:
    """Average the weights of `net` over a walk; return the largest difference from float64, relative to the
    largest weight of the tensor."""
    ema, nimg = EMA(model), 0
    assert list(ema.state_dict()) == list(unwrap(model).state_dict()) == ["weight", "bias"]
    exact = [p.detach().double().clone() for p in net.parameters()]
    random = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        model(torch.ones(2, 7)).square().mean().backward()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=random) - 0.001 * p.grad)
                p.grad = None
        beta = schedule(nimg)
        ema.update(model, beta)
        exact = [beta * r + (1 - beta) * p.detach().double() for r, p in zip(exact, net.parameters(), strict=True)]
        nimg += BATCH
    return max(((mine - r).abs().max() / r.abs().max()).item()
               for mine, r in zip(ema.module.parameters(), exact, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["plain", "compiled", "data parallel", "compiled, data parallel"])
def test_agrees_with_float64_over_1000_steps(kind: str, schedule: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(7, 5)
    model = net
    if "compiled" in kind:  # the wrapper is what an average has to see through; its backend is not
        model = torch.compile(net, backend="eager")
    if "data parallel" in kind:
        request.getfixturevalue("one_rank_group")
        model = torch.nn.parallel.DistributedDataParallel(model)
    assert follow(model, net, SCHEDULES[schedule]) < 1e-6


def test_power_law_weights_a_run_by_a_power_of_its_time() -> None:
    sigma_rel, steps = 0.15, 2000
    weights = np.zeros(steps)
    for step in range(steps):
        beta = power_law_beta(BATCH, step * BATCH, sigma_rel)
        weights *= beta
        weights[step] = 1 - beta
    time = (np.arange(steps) + 0.5) / steps
    mean = (weights * time).sum()
    assert weights.sum() == pytest.approx(1)
    assert np.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-2)
    exponent = power_law_exponent(sigma_rel)
    np.testing.assert_allclose(weights[100:], (exponent + 1) * time[100:] ** exponent / steps, rtol=1e-2)


def test_power_law_starts_as_a_copy_and_ends_as_the_plain_average() -> None:
    assert power_law_beta(BATCH, 0, 0.1) == 0
    assert power_law_beta(1, 9, 12 ** -0.5) == pytest.approx(0.9)
    for wrong in (0, 0.3, -1):
        with pytest.raises(ValueError, match="sigma_rel"):
            power_law_exponent(wrong)
