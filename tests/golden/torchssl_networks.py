"""The classifiers: names and shapes of their tensors, forward and backward, initialisation."""
from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.golden.cases import arrays, facts, fill, golden_dir, index
from TorchSSL.core.networks import build_network


def network_cases() -> list[dict[str, Any]]:
    return [case for case in index("torchssl")["cases"] if case.get("state_dict_file")]


def initialisation_cases() -> list[str]:
    return list(facts("torchssl", "init_stats.json")) if (golden_dir("torchssl") / "init_stats.json").exists() else []


SERVES = {case["id"] for case in network_cases()}


def build(case: dict[str, Any]) -> torch.nn.Module:
    arguments = dict(case["arguments"])
    return fill(build_network(arguments.pop("network"), **arguments))


def draw_inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(case["inputs"]["seed"])
    drawn = {}
    for entry in case["inputs"]["recipe"]:
        if entry["draw"] == "normal":
            value = rng.standard_normal(entry["shape"]).astype(np.float32) * np.float32(entry.get("scale", 1))
        else:
            value = rng.integers(entry["low"], entry["high"], entry["shape"])
        drawn[entry["name"]] = torch.from_numpy(value)
    return drawn


def tolerance(case: dict[str, Any], *kinds: str) -> dict[str, float]:
    """Read "KIND rtol X atol Y" from the case's tolerance text, for the first of `kinds` that it has."""
    for kind in kinds:
        found = re.search(rf"{kind} rtol (\S+?)(?: atol (\S+?))?(?:[;, ]|$)", case["tolerance"])
        if found:
            return {"rtol": float(found[1]), "atol": float(found[2] or 0)}
    raise KeyError(f"{case['id']}: no tolerance of {kinds}")


def expected(case: dict[str, Any]) -> dict[str, np.ndarray]:
    stored = arrays("torchssl", case["file"])
    return {name: stored[key] for name, key in case["output_keys"].items()}


def norms(tensors: list[torch.Tensor]) -> list[float]:
    return [tensor.double().norm().item() for tensor in tensors]


@pytest.mark.parametrize("case", network_cases(), ids=lambda case: case["id"])
def test_state_dict(case: dict[str, Any]) -> None:
    listed = facts("torchssl", case["state_dict_file"])
    ours = build(case).state_dict()
    assert list(ours) == list(listed)
    for name, tensor in ours.items():
        assert list(tensor.shape) == listed[name]["shape"], name
        assert str(tensor.dtype) == f"torch.{listed[name]['dtype']}", name


@pytest.mark.parametrize("case", network_cases(), ids=lambda case: case["id"])
def test_parameter_names(case: dict[str, Any]) -> None:
    listed = facts("torchssl", case["state_dict_file"].replace("_state", "_names"))
    net = build(case)
    assert [name for name, _ in net.named_parameters()] == listed["parameters_in_order"]
    batch_norms = [name for name, layer in net.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert batch_norms == listed["bn_layers_in_order"]
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == listed["n_trainable"]


@pytest.mark.parametrize("case", network_cases(), ids=lambda case: case["id"])
def test_forward_and_backward(case: dict[str, Any]) -> None:
    wanted, inputs, net = expected(case), draw_inputs(case), build(case)

    def outputs(*, mode: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        logits = net(inputs["x"])
        logits, rotation = logits if isinstance(logits, tuple) else (logits, None)
        named = {f"{mode}_logits": logits} | ({} if rotation is None else {f"{mode}_rot_logits": rotation})
        return named, logits

    def agree(named: dict[str, torch.Tensor], *kinds: str) -> None:
        for name, value in named.items():
            np.testing.assert_allclose(value.detach().numpy(), wanted.pop(name), **tolerance(case, *kinds),
                                       err_msg=name)

    net.eval()
    with torch.no_grad():
        named, logits = outputs(mode="eval")
        again, feature = net(inputs["x"], return_feature=True)
    assert torch.equal(logits, again)
    agree(named | ({"eval_feature": feature} if "eval_feature" in wanted else {}), "eval outputs", "outputs")

    net.train()
    named, logits = outputs(mode="train")
    loss = F.cross_entropy(logits, inputs["y"])
    if "train_rot_logits" in named:
        loss = loss + F.cross_entropy(named["train_rot_logits"], inputs["y_rot"])
    loss.backward()
    agree(named | {"train_loss": loss}, "train outputs", "outputs")

    gradients = [-1.0 if p.grad is None else p.grad.double().norm().item() for p in net.parameters()]
    np.testing.assert_allclose(gradients, wanted.pop("grad_l2"), **tolerance(case, "grad_l2"))
    without = facts("torchssl", case["state_dict_file"].replace("_state", "_names"))["parameters_without_gradient"]
    assert [name for name, p in net.named_parameters() if p.grad is None] == without

    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    used = np.array([f"{name}.weight" not in without for name, _ in layers])  # statistics of the others are optional
    for statistic in ("running_mean", "running_var"):
        ours = np.array(norms([getattr(layer, statistic) for _, layer in layers]))
        np.testing.assert_allclose(ours[used], wanted.pop(f"{statistic}_l2")[used], **tolerance(case, "running stats"))
    assert all(layer.num_batches_tracked == 1 for (_, layer), in_use in zip(layers, used, strict=True) if in_use)
    assert not wanted, f"not compared: {list(wanted)}"


@pytest.mark.parametrize("name", initialisation_cases())
def test_initialisation(name: str) -> None:
    depth, widen_factor = map(int, re.fullmatch(r"wrn_(\d+)_(\d+)", name).groups())
    torch.manual_seed(0)
    net = build_network("WideResNet", 10, depth=depth, widen_factor=widen_factor)
    for layer_name, fact in facts("torchssl", "init_stats.json")[name].items():
        layer = net.get_submodule(layer_name)
        weight, bias = layer.weight.detach(), layer.bias.detach()
        if fact["kind"] == "bn":
            assert (weight == 1).all() == fact["weight_all_one"] and (bias == 0).all() == fact["bias_all_zero"]
            assert layer.eps == fact["eps"] and layer.momentum == fact["momentum"]
            continue
        std = fact.get("weight_std_expected", fact.get("weight_std_xavier"))
        five_sigma = 5 * std / math.sqrt(2 * weight.numel())
        assert abs(weight.std().item() - std) < five_sigma, layer_name
        assert weight.abs().max() > 2.5 * std, f"{layer_name}: not normally distributed"
        if "bias_uniform_bound" in fact:
            assert fact["bias_uniform_bound"] / 2 < bias.abs().max() <= fact["bias_uniform_bound"], layer_name
        else:
            assert bias.abs().max() == fact["bias_absmax_measured"], layer_name
