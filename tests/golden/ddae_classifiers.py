"""Noise-conditional classifiers: the WideResNet, both perturbations, its learning rate, the MLP head."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.noise_classifier import WideResNet, learning_rate, training_view
from DDAE.ddae.noise_classifier import test_view as at_level
from DDAE.ddae.probe import NoiseHead
from tests.golden.cases import facts, fill, index
from tests.golden.ddae_compare import assert_close, cases, given, served, tensors

ALL = cases("classifiers.npz")
NETWORKS = [case for case in ALL if "blocks_per_group" in case["constructor"]]
VP_CASES = [case for case in ALL if "betas" in case["constructor"]]
VE_CASES = [case for case in ALL if "p_std" in case["constructor"]]
RATES = [case for case in ALL if "warm_epoch" in case["constructor"]]
HEADS = [case for case in ALL if "dim" in case["constructor"]]
LEVELS = [case for case in ALL if {"ddpm", "edm"} <= case["keys"].keys()]
CASES = served(NETWORKS + VP_CASES + VE_CASES + RATES + HEADS + LEVELS)


def name(case: dict) -> str:
    return case["id"]


def assert_state(net: torch.nn.Module, case: dict) -> None:
    file = f"{case['id']}_state.json"
    if file in index("ddae")["state_files"]:
        assert [[key, list(value.shape)] for key, value in net.state_dict().items()] == \
               [[key, shape] for key, shape in facts("ddae", file).items()]


@pytest.mark.parametrize("case", NETWORKS, ids=name)
def test_wideresnet(case):
    net = WideResNet(**case["constructor"]).eval()
    assert_state(net, case)
    counts = [(value.numel(), value.requires_grad) for value in net.parameters()]
    assert sum(count for count, _ in counts) == case["notes"]["params_total"]
    assert sum(count for count, trained in counts if trained) == case["notes"]["params_trainable"]
    fill(net)
    seen: dict[str, torch.Tensor] = {}
    stages = {"time_fourier": net.time_emb, "time_mlp": net.time_emb_mlp, "init_conv": net.init_conv,
              "group1": net.group1, "group2": net.group2, "group3": net.group3}
    for stage, module in stages.items():
        module.register_forward_hook(lambda _, __, out, stage=stage: seen.__setitem__(stage, out))
    expected = tensors(case)
    with torch.no_grad():
        seen["out"] = net(expected.pop("x"), expected.pop("t"))
    for key, reference in expected.items():
        stage, _, part = key.rpartition("_")
        if part == "gap":
            ours = seen[stage].mean((2, 3))
        elif part == "slice":
            ours = seen[stage][tuple(slice(side) for side in reference.shape)]
        else:
            ours = seen[key]
        assert_close(ours, reference, case["tolerance"], key)


@pytest.mark.parametrize("case", VP_CASES, ids=name)
def test_variance_preserving(case):
    made, expected = dict(case["constructor"]), tensors(case)
    count = made.pop("steps")
    way = DDPM(**made)
    x, time = training_view(way, expected["x01"], expected["t"].long(), expected["noise"])
    assert_close(x, expected["train_x"], case["tolerance"], "train_x")
    assert_close(time, expected["train_time"], case["tolerance"], "train_time")
    x, time = at_level(way, expected["x01"], case["inputs"]["t_test"], expected["noise"])
    assert_close(x, expected["test_x"], case["tolerance"], "test_x")
    assert_close(time, expected["test_time"], case["tolerance"], "test_time")
    assert way.test_levels(count) == expected["test_timesteps"].tolist()


@pytest.mark.parametrize("case", VE_CASES, ids=name)
def test_variance_exploding(case):
    # The images and their noise are those of the case before.
    images = next(tensors(other) for other in VP_CASES)
    expected, tolerance = tensors(case), case["tolerance"].partition("(")[0]
    made = dict(case["constructor"])
    steps = made.pop("steps")
    way = EDM(**made)
    x, time = training_view(way, images["x01"], expected["rnd"].flatten(), images["noise"])
    assert_close(x, expected["train_x"], tolerance, "train_x")
    assert_close(time, expected["train_time"], tolerance, "train_time")
    x, time = at_level(way, images["x01"], case["inputs"]["t_test"], images["noise"], steps=steps)
    scale = max(1.0, float(expected["test_x"].abs().max()))
    assert_close(x / scale, expected["test_x"] / scale, tolerance, "test_x")
    assert_close(time, expected["test_time"], tolerance, "test_time")
    assert_close(way.schedule(steps)[::-1], expected["times_f64"], "relative 1e-12", "times")
    assert way.test_levels(steps) == expected["test_timesteps"].tolist()


@pytest.mark.parametrize("case", RATES, ids=name)
def test_learning_rate(case):
    made = case["constructor"]
    rates = [learning_rate(epoch, made["lr"], made["epoch"], made["warm_epoch"]) for epoch in range(made["epoch"])]
    assert_close(rates, given(case)["lr_f64"], case["tolerance"], "lr")


@pytest.mark.parametrize("case", HEADS, ids=name)
def test_noise_head(case):
    net = NoiseHead(**case["constructor"]).eval()
    assert_state(net, case)
    fill(net)
    expected = tensors(case)
    with torch.no_grad():
        assert_close(net.time_emb(expected["t"]), expected["time_emb"], case["tolerance"], "time_emb")
        assert_close(net(expected["features"], expected["t"]), expected["out"], case["tolerance"], "out")


@pytest.mark.parametrize("case", LEVELS, ids=name)
def test_levels_of_the_test(case):
    expected = given(case)
    assert np.array_equal(DDPM([1e-4, 0.02], 1000).test_levels(), expected["ddpm"])
    assert np.array_equal(EDM().test_levels(), expected["edm"])
