"""The classifiers: names and shapes of their tensors, forward and backward, initialisation."""
from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.golden.cases import DEVICE, each, facts, fill, serves, tolerance
from tests.golden.torchssl_cases import PAPER, cases_of, draw_inputs, expected, norms
from TorchSSL import freematch
from TorchSSL.core.networks import build_network
from TorchSSL.core.trainer import make_optimizer

NETWORKS = cases_of("network")
SERVES = serves(NETWORKS)


def build(case: dict[str, Any]) -> torch.nn.Module:
    arguments = dict(case["arguments"])
    return fill(build_network(arguments.pop("network"), **arguments))


def names_of(case: dict[str, Any]) -> dict[str, Any]:
    return facts(PAPER, case["state_dict_file"].replace("_state", "_names"))


def stated(case: dict[str, Any], *kinds: str) -> dict[str, float]:
    """Return what a case's tolerance says after the first of `kinds` that it has: "KIND rtol X atol Y; ..."."""
    for kind in kinds:
        if found := re.search(rf"{kind} ((?:rtol|atol)[^;]*?)(?:;| and|$)", case["tolerance"]):
            return tolerance(found[1])
    raise LookupError(f"{case['id']}: no tolerance of {kinds}")


@each(NETWORKS)
def test_state_dict(case: dict[str, Any]) -> None:
    listed = facts(PAPER, case["state_dict_file"])
    if not listed:
        pytest.skip(f"there is no {case['state_dict_file']}")
    ours = build(case).state_dict()
    assert list(ours) == list(listed)
    for name, tensor in ours.items():
        assert list(tensor.shape) == listed[name]["shape"], name
        assert str(tensor.dtype) == f"torch.{listed[name]['dtype']}", name


@each(NETWORKS)
def test_parameter_names(case: dict[str, Any]) -> None:
    net = build(case)
    batch_norms = [name for name, layer in net.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    found = {"parameters_in_order": [name for name, _ in net.named_parameters()], "bn_layers_in_order": batch_norms,
             "n_trainable": sum(p.numel() for p in net.parameters() if p.requires_grad)}
    for key in found.keys() & names_of(case).keys():
        assert found[key] == names_of(case)[key], key


@each(NETWORKS)
def test_decayed_parameters(case: dict[str, Any]) -> None:
    """Weight decay is on what the published optimiser has it on: a few steps of training hardly show it."""
    net = build(case)
    names = {parameter: name for name, parameter in net.named_parameters()}
    for number, group in enumerate(make_optimizer(net, freematch.parse([])).param_groups):
        listed = next((value for key, value in names_of(case).items() if key.startswith(f"optimizer_group{number}")),
                      None)
        assert listed in (None, [names[parameter] for parameter in group["params"]])
        assert (group["weight_decay"] == 0) == (number == 1)


@each(NETWORKS)
def test_forward_and_backward(case: dict[str, Any]) -> None:
    wanted, net = expected(case), build(case)
    inputs = {name: value.to(DEVICE) for name, value in draw_inputs(case).items()}

    def outputs(*, mode: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        logits = net(inputs["x"])
        logits, rotation = logits if isinstance(logits, tuple) else (logits, None)
        named = {f"{mode}_logits": logits} | ({} if rotation is None else {f"{mode}_rot_logits": rotation})
        return named, logits

    def agree(named: dict[str, Any], *kinds: str) -> None:
        for name, value in named.items():
            if name in wanted:
                value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
                np.testing.assert_allclose(value, wanted.pop(name), **stated(case, *kinds), err_msg=name)

    net.eval()
    with torch.no_grad():
        named, logits = outputs(mode="eval")
        again, feature = net(inputs["x"], return_feature=True)
    assert torch.equal(logits, again)
    agree(named | {"eval_feature": feature}, "eval outputs", "outputs")

    net.train()
    named, logits = outputs(mode="train")
    loss = F.cross_entropy(logits, inputs["y"])
    if "train_rot_logits" in named:
        loss = loss + F.cross_entropy(named["train_rot_logits"], inputs["y_rot"])
    loss.backward()
    agree(named | {"train_loss": loss}, "train outputs", "outputs")
    agree({"grad_l2": norms(p.grad for p in net.parameters())}, "grad_l2")

    without = [name for name, p in net.named_parameters() if p.grad is None]
    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    used = np.array([f"{name}.weight" not in without for name, _ in layers])  # statistics of the others are optional
    for statistic in ("running_mean", "running_var"):
        ours = np.array(norms(getattr(layer, statistic) for _, layer in layers))
        theirs = wanted.pop(f"{statistic}_l2", ours)
        np.testing.assert_allclose(ours[used], theirs[used], **stated(case, "running stats"))
    assert all(layer.num_batches_tracked == 1 for (_, layer), in_use in zip(layers, used, strict=True) if in_use)
    assert not wanted, f"not compared: {list(wanted)}"
    assert without == names_of(case)["parameters_without_gradient"]


def network_of(layers: dict[str, dict[str, Any]]) -> torch.nn.Module:
    """Return a freshly initialised network with these layers: its kind follows from their names, width and number of
    classes from the ranges that are stated for the last one, or for the convolution before."""
    classifier, wide = layers["fc"], [re.match(r"block(\d)\.layer\.(\d+)", name) for name in layers]
    if "weight_uniform_bound_default" in classifier:
        features = round(classifier["weight_uniform_bound_default"] ** -2)
    else:
        conv, area = ("conv2", 9) if any(wide) else ("conv3", 1)
        std = [fact["weight_std_expected"] for name, fact in layers.items() if name.endswith(conv)][-1]
        features = round(2 / std ** 2 / area)
    classes = round(2 / classifier["weight_std_xavier"] ** 2) - features if "weight_std_xavier" in classifier else 10
    stages = max((int(found[1]) for found in wide if found), default=0)
    if not stages:
        return build_network("ResNet50", classes)
    blocks = 1 + max(int(found[2]) for found in wide if found)
    return build_network("WideResNetVar" if stages == 4 else "WideResNet", classes, depth=6 * blocks + 4,
                         widen_factor=features // (16 * 2 ** (stages - 1)))


@pytest.mark.parametrize("name", facts(PAPER, "init_stats.json"))
def test_initialisation(name: str) -> None:
    torch.manual_seed(0)
    layers = facts(PAPER, "init_stats.json")[name]
    net = network_of(layers)
    for layer_name, fact in layers.items():
        layer = net.get_submodule(layer_name)
        weight = layer.weight.detach()
        if fact["kind"] == "bn":
            assert (weight == 1).all() == fact["weight_all_one"] and (layer.bias == 0).all() == fact["bias_all_zero"]
            assert layer.eps == fact["eps"] and layer.momentum == fact["momentum"]
            continue
        if is_uniform(fact):
            bound = fact["weight_uniform_bound_default"]
            assert bound / 2 < weight.abs().max() <= bound, layer_name
            std = bound / math.sqrt(3)
        else:
            std = fact.get("weight_std_expected", fact.get("weight_std_xavier"))
            assert weight.abs().max() > 2.5 * std, f"{layer_name}: not normally distributed"
        assert abs(weight.std().item() - std) < 5 * std / math.sqrt(2 * weight.numel()), layer_name
        check_bias(layer.bias, fact, layer_name)


def is_uniform(fact: dict[str, Any]) -> bool:
    """Return whether what was measured of a linear layer keeps to PyTorch's own range, which a normal one does not."""
    return fact.get("weight_absmax_measured", math.inf) <= fact.get("weight_uniform_bound_default", 0) * (1 + 1e-6)


def check_bias(bias: torch.Tensor | None, fact: dict[str, Any], name: str) -> None:
    """A layer without bias has none measured; another is 0, or uniform up to a stated bound or PyTorch's own."""
    measured = fact.get("bias_absmax_measured")
    if measured is None:
        assert bias is None, name
        return
    largest = bias.detach().abs().max().item()
    bound = fact.get("bias_uniform_bound", fact.get("weight_uniform_bound_default"))
    if measured == 0:
        assert largest == 0, name
    else:
        assert bound / 2 < largest <= bound, name
