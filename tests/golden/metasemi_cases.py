"""What the cases of MetaSemi share: sections of the index, networks described in words, tolerances, batches."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from MetaSemi.core.model import ConvLarge
from tests.golden.cases import Stored, arrays, fill, index, number, whole

PAPER = "metasemi"
Case = dict[str, Any]


def section(name: str) -> dict[str, Any]:
    return index(PAPER).get(name, {})


def cases_of(name: str, *fields: str) -> list[Case]:
    """Return the cases of a section that have all these fields, each with its name and the file of its arrays."""
    found, file = section(name).get("cases", {}), section(name).get("file")
    return [Stored(f"{PAPER}: {key}", {"file": file, **case, "name": key}) for key, case in found.items()
            if all(field in case for field in fields)]


def stored(case: Case) -> Stored:
    return arrays(PAPER, case["file"] or "")


def each_key(keys: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", list(keys))


# ---------------------------------------------------------------------------------------------------------- networks

def conv_large(text: str, input_dim: int, classes: int) -> ConvLarge:
    return fill(ConvLarge(input_dim, classes, "stochastic=False" not in text, "top_bn=True" in text))


def network_of(case: Case) -> nn.Module:
    """Return the filled network of a training case: its index entry names the layers in words, sizes follow from the
    shapes of the state."""
    text, shapes = case["network"], case["state_shapes"]
    if text.startswith("ConvLarge"):
        first, classes = next(iter(shapes.values())), [shape[0] for shape in shapes.values() if len(shape) == 2][-1]
        return conv_large(text, first[1], classes)
    layers = re.findall(r"(?:^|[:,]) *(\d+) ([A-Z]\w*)(.*?)(?=, *\d+ [A-Z]|;|$)", text)
    return fill(nn.Sequential(*(layer_of(name, inside, shapes.get(f"{place}.weight"), f"{place}.bias" in shapes)
                                for place, name, inside in layers)))


def layer_of(name: str, inside: str, shape: list[int] | None, bias: bool) -> nn.Module:
    """Return e.g. the convolution of `Conv2d`, "(3->8,k3,s2,p1,no bias)" and the shape of its weight."""
    def given(letter: str, default: int) -> int:
        return whole(inside, rf"\b{letter}(?:ernel|tride|adding)?=? #", default)

    def single(default: float) -> float:
        return number(inside, r"\(#", default)

    match name:
        case "Conv2d":
            return nn.Conv2d(shape[1], shape[0], shape[2:], given("s", 1), given("p", 0), bias=bias)
        case "Linear":
            return nn.Linear(shape[1], shape[0], bias=bias)
        case "BatchNorm1d" | "BatchNorm2d":
            return getattr(nn, name)(shape[0])
        case "MaxPool2d" | "AvgPool2d":
            kernel = given("k", int(single(2)))
            return getattr(nn, name)(kernel, given("s", kernel), given("p", 0))
        case "AdaptiveAvgPool2d" | "AdaptiveMaxPool2d":
            return getattr(nn, name)(int(single(1)))
        case "LeakyReLU":
            return nn.LeakyReLU(single(0.01))
        case "Dropout" | "Dropout2d":
            return getattr(nn, name)(single(0.5))
        case "Flatten" | "ReLU" | "Identity" | "Tanh" | "SiLU" | "GELU":
            return getattr(nn, name)()
    raise LookupError(f"no layer {name}{inside}")


# -------------------------------------------------------------------------------------------------------- tolerances

class Tolerances:
    """The tolerances that a training case states in words."""

    def __init__(self, case: Case) -> None:
        text = case["tolerance"]
        self.atol, self.rtol = number(text, "state: atol #"), number(text, r"state: atol [\d.e-]+,? rtol #")
        self.meta_grad = number(text, "meta_grad: atol #", self.atol)
        self.pseudo, self.pseudo_by_rate = number(text, "pseudo: atol #", self.atol), number(text, r"lr ?\* ?#", 0)
        self.norm_rtol, self.of_norm = number(text, "norm rtol #", 0), number(text, "dot within #", 0)

    def close(self, found: Any, wanted: Any, what: str) -> None:
        np.testing.assert_allclose(plain(found), wanted, rtol=self.rtol, atol=self.atol, err_msg=what)

    def near(self, found: Any, wanted: Any, atol: float, what: str) -> None:
        np.testing.assert_allclose(plain(found), wanted, rtol=0, atol=atol, err_msg=what)

    def statistics(self, found: np.ndarray, wanted: np.ndarray, what: str) -> None:
        """Compare rows of (sum, L2 norm, dot with the probe)."""
        np.testing.assert_allclose(found[:, 1], wanted[:, 1], rtol=self.norm_rtol, err_msg=what)
        allowed = self.of_norm * wanted[:, 1:2] + 1e-12
        assert (np.abs(found - wanted)[:, [0, 2]] <= allowed).all(), what


def plain(value: Any) -> np.ndarray:
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float64)


# ----------------------------------------------------------------------------------------------------------- batches

def parts(case: Case, name: str) -> dict[str, np.ndarray]:
    """Return the arrays `<name>/<tensor>` of a case by tensor."""
    return {key.removeprefix(f"{name}/"): value for key, value in stored(case).items() if key.startswith(f"{name}/")}


def tensor(case: Case, name: str, step: int) -> torch.Tensor:
    return torch.from_numpy(stored(case)[name][step])
