"""The networks: names, shapes and order of tensors, outputs, features, statistics, and Shake-Shake gates."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from MetaSemi.core.model import ConvLarge, ResNet32x32, ShakeShakeBlock, shakeshake26, stage
from tests.golden.cases import arrays, facts, fill, golden_dir, index

NETS = index("metasemi")["nets"]
SERVES = {("nets", name) for name in NETS["cases"]}
WHOLE = [name for name, case in NETS["cases"].items() if "forward_gates_on_branch_a" not in case]
BLOCKS = [name for name in NETS["cases"] if name not in WHOLE]


def build(case: dict[str, Any]) -> torch.nn.Module:
    """Return the network that a case describes in words, filled."""
    text = case["what"]

    def given(pattern: str, default: Any = None) -> Any:
        found = re.search(pattern, text)
        return int(found[1]) if found else default

    classes = given(r"(\d+) classes", 10)
    if text.startswith("ConvLarge"):
        return fill(ConvLarge(given(r"(\d+) input channels", 3), classes, "stochastic=False" not in text,
                              "top_bn=True" in text))
    if text.startswith("shakeshake26"):
        return fill(shakeshake26(classes))
    if text.startswith("ResNet32x32"):
        layers = [int(number) for number in re.search(r"layers \[([^\]]*)\]", text)[1].split(",")]
        return fill(ResNet32x32(ShakeShakeBlock, layers, given(r"channels (\d+)"), classes, shortcut_of(text)))
    inplanes, planes = map(int, re.search(r"(\d+)->(\d+) channels", text).groups())
    return fill(stage(ShakeShakeBlock, inplanes, planes, 1, given(r"stride (\d+)"), shortcut_of(text))[0])


def shortcut_of(text: str) -> str:
    return "basic" if re.search(r"basic downsample|shortcut basic", text) else "shift_conv"


def tolerance(case: dict[str, Any]) -> dict[str, float]:
    return {kind: float(value) for kind, value in re.findall(r"(atol|rtol) ([\d.]+(?:e-?\d+)?)", case["tolerance"])}


def expected(case: dict[str, Any], key: str) -> np.ndarray:
    return arrays("metasemi", NETS["file"])[case["keys"][key]]


@pytest.mark.parametrize("name", [name for name in NETS["cases"] if (golden_dir("metasemi") / f"{name}_state.json"
                                                                     ).exists()])
def test_state(name: str) -> None:
    listed = facts("metasemi", f"{name}_state.json")["state"]
    ours = build(NETS["cases"][name]).state_dict()
    assert list(ours) == list(listed)
    assert {key: list(value.shape) for key, value in ours.items()} == listed


@pytest.mark.parametrize("name", WHOLE)
def test_output(name: str) -> None:
    case = NETS["cases"][name]
    net = build(case).train(case["mode"] == "train")
    assert sum(value.numel() for value in net.parameters()) == case["param_count"]
    images = torch.from_numpy(expected(case, "input"))
    with torch.no_grad():
        if "feature" in case["keys"]:
            np.testing.assert_allclose(net.features(images), expected(case, "feature"), **tolerance(case))
        np.testing.assert_allclose(net(images), expected(case, "output"), **tolerance(case))
    if "buffers_after" in case["keys"]:
        stored, prefix = arrays("metasemi", NETS["file"]), case["keys"]["buffers_after"].partition("<")[0]
        after = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        assert after
        for key, value in after.items():
            np.testing.assert_allclose(net.get_buffer(key), value, err_msg=key, **tolerance(case))


class Replayed:
    """Gates in the order in which a block asks for them: forward, then backward."""

    def __init__(self, *gates: list[float]) -> None:
        self.gates = list(gates)

    def uniform(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.gates.pop(0)).view(shape)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_with_given_gates(name: str) -> None:
    case = NETS["cases"][name]
    block = build(case).train()
    block.noise = Replayed(case["forward_gates_on_branch_a"], case["backward_gates_on_branch_a"])
    images = torch.from_numpy(expected(case, "input")).requires_grad_()
    out = block(images)
    seed = int(re.search(r"default_rng\((\d+)\)", case["loss"])[1])
    weights = np.random.default_rng(seed).standard_normal(out.shape).astype(np.float32)
    (out * torch.from_numpy(weights)).sum().backward()
    for key, found in {"output": out.detach(), "grad_wrt_input": images.grad, "grad_conv_a2": block.conv_a2.weight.grad,
                       "grad_conv_b2": block.conv_b2.weight.grad}.items():
        np.testing.assert_allclose(found, expected(case, key), err_msg=key, **tolerance(case))
