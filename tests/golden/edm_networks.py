"""The U-Nets: names and shapes of the state, outputs, gradients, initial weights."""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from EDM.training.networks import DhariwalUNet, SongUNet
from tests.golden.cases import arrays, facts, fill, index

NETWORK_CASES = [case for case in index("edm")["cases"] if case["kind"] == "network"]
INIT_CASES = [case for case in index("edm")["cases"] if case["kind"] == "initialisation"]
CASES = {case["case"] for case in NETWORK_CASES + INIT_CASES}
CLASSES = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def bound(text: str) -> float:
    """Return the first number of a stated tolerance."""
    return float(re.search(r"\d+(\.\d+)?(e-?\d+)?", text)[0])


def make(case: dict) -> torch.nn.Module:
    return CLASSES[case["network"]](**case["constructor"]).eval()


def tensors(case: dict) -> dict[str, torch.Tensor]:
    """Return the arrays that the case lists, without the part of their names that comes before the last slash."""
    stored = arrays("edm", case["file"])
    return {name.rsplit("/", 1)[-1]: torch.from_numpy(stored[name].copy()) for name in case["arrays"]}


@pytest.fixture(scope="module", params=NETWORK_CASES, ids=lambda case: case["case"])
def filled(request) -> tuple[dict, torch.nn.Module, dict[str, torch.Tensor]]:
    case = request.param
    net, given = fill(make(case)), tensors(case)
    if "freqs" in given:
        net.map_noise.freqs.copy_(given["freqs"])
    return case, net, given


def test_network_state(filled):
    case, net, _ = filled
    expected = facts("edm", case["state_file"])
    expected = list(expected.items()) if isinstance(expected, dict) else expected
    assert [[name, list(tensor.shape)] for name, tensor in net.state_dict().items()] == [list(e) for e in expected]
    assert sum(parameter.numel() for parameter in net.parameters()) == case["parameters"]
    heads = {name: module.heads for name, module in net.named_modules() if getattr(module, "heads", 0)}
    assert heads == case["num_heads"]


@pytest.mark.parametrize("layout", FORMATS)
def test_network_output_and_gradients(filled, layout):
    case, net, given = filled
    tolerance = case["tolerance"]
    net.to(memory_format=FORMATS[layout]).zero_grad(set_to_none=True)
    x = given["x"].detach().contiguous(memory_format=FORMATS[layout]).requires_grad_()
    out = net(x, given["noise_labels"], given.get("class_labels"), given.get("augment_labels"))
    (0.5 * out.square().sum()).backward()
    assert (out - given["out"]).abs().max() <= bound(tolerance["out"]) * given["out"].abs().max()
    assert (x.grad - given["grad_x"]).abs().max() <= bound(tolerance["grad_x"]) * given["grad_x"].abs().max()

    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == case["params_without_grad"]
    norms = {name: norm for name, norm in facts("edm", case["param_grad_norms_file"]).items() if norm is not None}
    relative = bound(tolerance["param_grad_norms"])
    smallest = 1e-3 * np.median(list(norms.values()))  # below, the true gradient is zero
    for name, norm in norms.items():
        if norm >= smallest:
            assert gradients[name].norm().item() == pytest.approx(norm, rel=relative), name


def initial_scales() -> list:
    return [pytest.param(network, expected, id=network["case"]) for case in INIT_CASES for network in NETWORK_CASES
            if (expected := facts("edm", case["file"]).get(network["case"]))]


@pytest.mark.parametrize(("network", "expected"), initial_scales())
def test_initial_weights(network, expected):
    torch.manual_seed(0)
    parameters = dict(make(network).named_parameters())
    assert parameters.keys() == expected.keys()
    for name, (distribution, scale) in expected.items():
        values = parameters[name].detach().double().flatten()
        if distribution == "constant":
            assert (values == scale).all(), name
            continue
        # What is drawn has mean 0 and this deviation, to 5 standard errors of the estimates.
        deviation = scale / 3**0.5 if distribution == "uniform_bound" else scale
        error = 5 / len(values) ** 0.5
        assert abs(values.mean()) <= error * deviation, name
        assert values.square().mean().sqrt() == pytest.approx(deviation, rel=error), name
        if distribution == "uniform_bound":
            assert values.abs().max() <= scale * (1 + 1e-6), name
            assert values.abs().max() >= scale * (1 - 20 / len(values)), name
        else:
            assert distribution == "normal_std", f"{name}: unknown distribution {distribution}"


def test_initial_weights_cover_every_network_listed():
    known = {case["case"] for case in NETWORK_CASES}
    assert all(facts("edm", case["file"]).keys() <= known for case in INIT_CASES)
