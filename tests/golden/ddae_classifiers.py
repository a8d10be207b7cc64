"""Noise-conditional classifiers: the WideResNet, both perturbations, its learning rate, the MLP head."""
from __future__ import annotations

import pytest
import torch

from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.noise_classifier import WideResNet, learning_rate, training_view
from DDAE.ddae.noise_classifier import test_view as at_level
from DDAE.ddae.probe import NoiseHead
from tests.golden.cases import each, fill, number, serves
from tests.golden.ddae_compare import ALL, assert_close, cases_of, check_state, given, tensors

WIDE, VP_CASES, VE_CASES = cases_of("wide resnet"), cases_of("vp"), cases_of("ve")
RATES, HEADS, LEVELS = cases_of("learning rate"), cases_of("noise head"), cases_of("test levels")
SERVES = serves(WIDE, VP_CASES, VE_CASES, RATES, HEADS, LEVELS)


@each(WIDE)
def test_wideresnet(case):
    net = WideResNet(**case["constructor"]).eval()
    check_state(net, f"{case['id']}_state.json")
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


@each(VP_CASES)
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


@each(VE_CASES)
def test_variance_exploding(case):
    # The images and their noise are those of the case before, if it has none itself.
    before = [other for other in ALL[:ALL.index(case) + 1] if "x01" in other["keys"]]
    if not before:
        pytest.skip("there is no case with images before")
    expected, images, tolerance = tensors(case), tensors(before[-1]), case["tolerance"].partition("(")[0]
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
    assert_close(way.schedule(steps)[::-1], expected["times_f64"],
                 f"relative {number(case['tolerance'], 'times: relative #', 1e-12)}", "times")
    assert way.test_levels(steps) == expected["test_timesteps"].tolist()


@each(RATES)
def test_learning_rate(case):
    made = case["constructor"]
    rates = [learning_rate(epoch, made["lr"], made["epoch"], made["warm_epoch"]) for epoch in range(made["epoch"])]
    assert_close(rates, given(case)["lr_f64"], case["tolerance"], "lr")


@each(HEADS)
def test_noise_head(case):
    net = NoiseHead(**case["constructor"]).eval()
    check_state(net, f"{case['id']}_state.json")
    fill(net)
    expected = tensors(case)
    with torch.no_grad():
        if "time_emb" in expected:
            assert_close(net.time_emb(expected["t"]), expected["time_emb"], case["tolerance"], "time_emb")
        assert_close(net(expected["features"], expected["t"]), expected["out"], case["tolerance"], "out")


@each(LEVELS)
def test_levels_of_the_test(case):
    expected, made = given(case), case["constructor"]
    ways = {"ddpm": DDPM(made.get("betas", [1e-4, 0.02]), made.get("n_T", 1000)), "edm": EDM()}
    for name, levels in expected.items():
        assert ways[name].test_levels(len(levels)) == levels.tolist()
