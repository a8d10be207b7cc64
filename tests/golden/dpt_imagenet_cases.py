"""What the golden cases of DPT on ImageNet share: their kinds, their arrays, and how they state closeness."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from tests.golden import cases as golden
from tests.golden.cases import Stored, facts, fill

PAPER = "dpt_imagenet"
Case = dict[str, Any]
ALL = golden.cases(PAPER)


def cases_of(*kinds: str) -> list[Case]:
    return [case for case in ALL if case.get("kind") in kinds]


def given(case: Case) -> Stored:
    """Return the arrays that a case lists, by the last part of their keys; skip where the file has none of them."""
    found = golden.arrays(PAPER, case["file"])
    named = {key.rpartition("/")[2]: found[key] for key in case["arrays"] if key in found}
    if not named:
        found[case["arrays"][0]]  # skips
    return Stored(f"{found.file}: {case['case']}", named)


def tensors(case: Case) -> Stored:
    """Return copies of the arrays that a case lists, as tensors."""
    found = given(case)
    return Stored(found.file, {name: torch.from_numpy(np.array(value)) for name, value in found.items()})


def bounds(text: str) -> list[float]:
    """Return the bounds that a tolerance states, in their order, without the times t for which they count."""
    return golden.bounds(re.sub(r"\bt ?[<>=]+ ?[\d.e-]+", "", text))


def bound(text: str) -> float:
    return bounds(text)[0]


def near(ours: Any, reference: Any, allowed: float, what: str) -> None:
    """Assert that the largest absolute error is at most `allowed` times the largest value of the reference."""
    ours, reference = as_array(ours), as_array(reference)
    assert ours.shape == reference.shape, f"{what}: shape {ours.shape}, expected {reference.shape}"
    error, scale = np.abs(ours - reference).max(initial=0), np.abs(reference).max(initial=0)
    assert error <= allowed * scale, f"{what}: {error:.3g} apart, allowed {allowed * scale:.3g}"


def relative(ours: Any, reference: Any, allowed: float, what: str, absolute: float = 0.0) -> None:
    np.testing.assert_allclose(as_array(ours), as_array(reference), rtol=allowed, atol=absolute, err_msg=what)


def as_array(value: Any) -> np.ndarray:
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, np.float64)


def check_state(net: torch.nn.Module, case: Case) -> None:
    """Assert names, shapes and order of a network's tensors, and the number of its parameters."""
    state = [[name, list(tensor.shape)] for name, tensor in net.state_dict().items()]
    if listed := facts(PAPER, case["state_file"]):
        assert state == listed
    assert sum(parameter.numel() for parameter in net.parameters()) == case["parameters"]


def check_gradients(net: torch.nn.Module, case: Case, floor: float = 0.0) -> None:
    """Assert the norms of the parameters' gradients. floor: fraction of the median norm below which none is looked
    at."""
    norms = facts(PAPER, case["param_grad_norms_file"])
    least = floor * np.median(list(norms.values())) if norms else 0.0
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    for name, norm in norms.items():
        if norm >= least:
            assert found[name] is not None, name
            relative(found[name].norm(), norm, bound(case["tolerance"]["param_grad_norms"]), name)


def analytic(case: Case):
    """Return the stand-in for a network that the field `model` describes, of (x, network time)."""
    assert case["model"].startswith("eps(x, tau) = sqrt(1-a)*x/(a*s^2 + 1-a) + b*sin(c*x + d*tau)"), case["model"]
    linear, square = golden.number(case["model"], r"exp\(-\(# \*tau"), golden.number(case["model"], r"\+ # \*tau\^2")
    s, b, c, d = (case["model_constants"][name] for name in "sbcd")

    def model(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        tau = (time / case["time_scale"]).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        a = torch.exp(-(linear * tau + square * tau**2))
        return (1 - a).sqrt() * x / (a * s**2 + 1 - a) + b * torch.sin(c * x + d * tau)

    return model


def filled(net: torch.nn.Module) -> torch.nn.Module:
    return fill(net).eval()
