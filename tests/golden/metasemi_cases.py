"""What the cases of metasemi have in common: networks described in words, tolerances, recorded batches."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import nn

from MetaSemi.core.model import ConvLarge
from tests.golden.cases import arrays, fill, index

TRAINING = index("metasemi")["training"]["cases"]


def network_of(case: dict[str, Any]) -> nn.Module:
    """Return the filled network of a training case, which its index entry describes in words."""
    text = case["network"]
    classes = last_linear(case["state_shapes"])
    if text.startswith("ConvLarge"):
        return fill(ConvLarge(num_classes=classes, stochastic="stochastic=False" not in text))
    layers = [layer_of(name, inside or "", classes)
              for name, inside in re.findall(r"\b\d+ (\w+)(?:\(([^)]*)\))?", text.partition(":")[2])]
    return fill(nn.Sequential(*layers))


def last_linear(shapes: dict[str, list[int]]) -> int:
    return [shape[0] for shape in shapes.values() if len(shape) == 2][-1]


def layer_of(name: str, inside: str, classes: int) -> nn.Module:
    """Return e.g. the convolution of `Conv2d` and "3->8,k3,s2,p1,no bias"."""
    ends = re.search(r"(\d+)->(\w+)", inside)
    if name == "Conv2d":
        def given(letter: str, default: int) -> int:
            found = re.search(rf"(?:^|,){letter}(\d+)", inside)
            return int(found[1]) if found else default

        return nn.Conv2d(int(ends[1]), int(ends[2]), given("k", 1), given("s", 1), given("p", 0),
                         bias="no bias" not in inside)
    if name == "Linear":
        return nn.Linear(int(ends[1]), classes if ends[2] == "num_classes" else int(ends[2]))
    simple = {"BatchNorm2d": (nn.BatchNorm2d, int), "LeakyReLU": (nn.LeakyReLU, float),
              "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d, int)}
    if name in simple:
        kind, read = simple[name]
        return kind(read(inside))
    return {"Flatten": nn.Flatten, "ReLU": nn.ReLU}[name]()


class Tolerances:
    """The tolerances that a training case states in words."""

    def __init__(self, case: dict[str, Any]) -> None:
        text = case["tolerance"]
        number = r"(\d[\d.]*(?:e-?\d+)?)"
        general = re.search(rf"state: atol {number}, rtol {number}", text)
        self.atol, self.rtol = float(general[1]), float(general[2])
        self.meta_grad = float(re.search(rf"meta_grad: atol {number}", text)[1])
        pseudo = re.search(rf"pseudo: atol {number} \+ lr\*{number}", text)
        self.pseudo, self.pseudo_by_rate = float(pseudo[1]), float(pseudo[2])
        norm = re.search(rf"norm rtol {number}; sum and dot within {number}", text)
        self.norm_rtol, self.of_norm = float(norm[1]), float(norm[2])

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


def stored(case: dict[str, Any]) -> dict[str, np.ndarray]:
    return arrays("metasemi", case["file"])


def parts(case: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    """Return the arrays `<name>/<tensor>` of a case by tensor."""
    return {key.removeprefix(f"{name}/"): value for key, value in stored(case).items() if key.startswith(f"{name}/")}


def tensor(case: dict[str, Any], name: str, step: int) -> torch.Tensor:
    return torch.from_numpy(stored(case)[name][step])
