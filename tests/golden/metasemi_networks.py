"""The networks: names, shapes and order of tensors, outputs, features, statistics, and Shake-Shake gates."""
from __future__ import annotations

import re

import numpy as np
import torch

from MetaSemi.core.model import ResNet32x32, ShakeShakeBlock, shakeshake26, stage
from tests.golden.cases import DEVICE, each, facts, fill, number, numbers, tolerance, whole
from tests.golden.metasemi_cases import PAPER, Case, cases_of, conv_large, stored

NETS = cases_of("nets")
SERVES = {("nets", case["name"]) for case in NETS}
BLOCKS = cases_of("nets", "forward_gates_on_branch_a")
WHOLE = [case for case in NETS if case not in BLOCKS]


def build(case: Case) -> torch.nn.Module:
    """Return the network that a case describes in words, filled."""
    text = case["what"]
    classes = whole(text, "# classes", 10)
    if text.startswith("ConvLarge"):
        channels = number(text, r"input_dim\W*#", number(text, "# input channels", 3))
        return conv_large(text, int(channels), classes)
    if text.startswith("shakeshake26"):
        return fill(shakeshake26(classes))
    if text.startswith("ResNet32x32"):
        layers = numbers(re.search(r"layers \[([^\]]*)\]", text)[1])
        return fill(ResNet32x32(ShakeShakeBlock, layers, whole(text, "channels #"), classes, shortcut_of(text)))
    inplanes, planes = numbers(re.search(r"\d+ ?-> ?\d+", text)[0])
    return fill(stage(ShakeShakeBlock, inplanes, planes, 1, whole(text, "stride #"), shortcut_of(text))[0])


def shortcut_of(text: str) -> str:
    return "basic" if re.search(r"basic downsample|shortcut basic", text) else "shift_conv"


def expected(case: Case, key: str) -> np.ndarray:
    return stored(case)[case["keys"][key]]


@each(NETS)
def test_state(case: Case) -> None:
    listed = facts(PAPER, f"{case['name']}_state.json")["state"]
    ours = build(case).state_dict()
    assert list(ours) == list(listed)
    assert {key: list(value.shape) for key, value in ours.items()} == listed


@each(WHOLE)
def test_output(case: Case) -> None:
    net, allowed = build(case).train(case["mode"] == "train"), tolerance(case["tolerance"])
    assert sum(value.numel() for value in net.parameters()) == case["param_count"]
    images = torch.from_numpy(expected(case, "input")).to(DEVICE)
    with torch.no_grad():
        if "feature" in case["keys"]:
            np.testing.assert_allclose(net.features(images).cpu(), expected(case, "feature"), **allowed)
        np.testing.assert_allclose(net(images).cpu(), expected(case, "output"), **allowed)
    if "buffers_after" in case["keys"]:
        prefix = case["keys"]["buffers_after"].partition("<")[0]
        for key, value in stored(case).items():
            if key.startswith(prefix):
                found = net.get_buffer(key.removeprefix(prefix)).cpu()
                np.testing.assert_allclose(found, value, err_msg=key, **allowed)


class Replayed:
    """Gates in the order in which a block asks for them: forward, then backward."""

    def __init__(self, *gates: list[float]) -> None:
        self.gates = list(gates)

    def uniform(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.gates.pop(0)).view(shape)


@each(BLOCKS)
def test_block_with_given_gates(case: Case) -> None:
    block = build(case).train()
    block.noise = Replayed(case["forward_gates_on_branch_a"], case["backward_gates_on_branch_a"])
    images = torch.from_numpy(expected(case, "input")).requires_grad_()
    out = block(images)
    seed = whole(case["loss"], r"default_rng\(#\)")
    weights = np.random.default_rng(seed).standard_normal(out.shape).astype(np.float32)
    (out * torch.from_numpy(weights)).sum().backward()
    for key, found in {"output": out.detach(), "grad_wrt_input": images.grad, "grad_conv_a2": block.conv_a2.weight.grad,
                       "grad_conv_b2": block.conv_b2.weight.grad}.items():
        if key in case["keys"]:
            np.testing.assert_allclose(found, expected(case, key), err_msg=key, **tolerance(case["tolerance"]))
