"""Access to the golden numbers of TDSM."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.golden.cases import arrays, facts, golden_dir, index


def cases_of(file: str) -> list[dict[str, Any]]:
    return [case for case in index("tdsm")["cases"] if case["file"] == file]


def each(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["case"])


def tensors(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the arrays of a case by their key."""
    stored = arrays("tdsm", case["file"])
    return {key: torch.from_numpy(stored[f"{case['case']}.{key}"].copy()) for key in case["keys"]}


def numbers(case: dict[str, Any]) -> list[float]:
    """Return the bounds in the words of a case's tolerance, in their order."""
    return [float(text) for text in re.findall(r"\d+(?:\.\d+)?e-?\d+|0\.\d+", case["tolerance"])]


def assert_state(net: torch.nn.Module, file: str, listed: bool = True) -> None:
    """Assert names, order and shapes of parameters and buffers. listed: the index names the file, so it is there."""
    if not listed and not (golden_dir("tdsm") / file).exists():
        return
    expected = facts("tdsm", file)
    assert [[name, list(tensor.shape)] for name, tensor in net.named_parameters()] == \
        [[name, shape] for name, shape in expected["parameters"].items()]
    assert [[name, list(tensor.shape)] for name, tensor in net.named_buffers()] == \
        [[name, shape] for name, shape in expected["buffers"].items()]
    if "n_params" in expected:
        assert sum(parameter.numel() for parameter in net.parameters()) == expected["n_params"]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, absolute: float, relative: float) -> None:
    """Assert that every element is within either bound."""
    ours, theirs = ours.detach().double(), theirs.double()
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() <= torch.maximum(torch.tensor(absolute), relative * theirs.abs())).all(), \
        float((ours - theirs).abs().max())


def one_hot(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.from_numpy(np.eye(num_classes, dtype=np.float32))[labels]
