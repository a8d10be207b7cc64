"""The U-Nets: names and shapes of the state, outputs, gradients, initial weights."""
from __future__ import annotations

import pytest
import torch

from EDM.training.networks import DhariwalUNet, SongUNet
from tests.golden.cases import Stored, facts, fill, name_of, serves
from tests.golden.edm_cases import PAPER, bound, cases, compare_norms, listed_state, tensors

NETWORKS, INITIALISATIONS = cases(kind="network"), cases(kind="initialisation")
SERVES = serves(NETWORKS, INITIALISATIONS)
CLASSES = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def make(case: dict) -> torch.nn.Module:
    return CLASSES[case["network"]](**case["constructor"]).eval()


@pytest.fixture(scope="module", params=NETWORKS, ids=name_of)
def filled(request) -> tuple[dict, torch.nn.Module, Stored]:
    case = request.param
    net, given = fill(make(case)), tensors(case)
    if "freqs" in given:
        net.map_noise.freqs.copy_(given["freqs"])
    return case, net, given


def test_network_state(filled):
    case, net, _ = filled
    assert sum(parameter.numel() for parameter in net.parameters()) == case["parameters"]
    heads = {name: module.heads for name, module in net.named_modules() if getattr(module, "heads", 0)}
    assert heads == case["num_heads"]
    expected = listed_state(case["state_file"])
    if not expected:
        pytest.skip(f"there is no {case['state_file']}")
    assert [[name, list(tensor.shape)] for name, tensor in net.state_dict().items()] == expected


@pytest.mark.parametrize("layout", FORMATS)
def test_network_output_and_gradients(filled, layout):
    case, net, given = filled
    net.to(memory_format=FORMATS[layout]).zero_grad(set_to_none=True)
    x = given["x"].detach().contiguous(memory_format=FORMATS[layout]).requires_grad_()
    out = net(x, given["noise_labels"], given.get("class_labels"), given.get("augment_labels"))
    (0.5 * out.square().sum()).backward()
    for name, found in (("out", out), ("grad_x", x.grad)):
        if name in given:
            assert (found - given[name]).abs().max() <= bound(case, name) * given[name].abs().max()
    without = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert without == case["params_without_grad"]
    compare_norms(net, case["param_grad_norms_file"], bound(case, "param_grad_norms"))


def initial_scales() -> list:
    """Return (network, expected scales) of every entry; None where the index has no such network."""
    known = {name_of(case): case for case in NETWORKS}
    return [pytest.param(known.get(name), expected, id=name)
            for case in INITIALISATIONS for name, expected in facts(PAPER, case.get("file", "")).items()]


@pytest.mark.parametrize(("network", "expected"), initial_scales())
def test_initial_weights(network, expected):
    if network is None:
        pytest.skip("there is no such network")
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

