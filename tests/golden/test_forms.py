"""Forms that another set of golden numbers may use, beside those of the present one."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden.cases import Stored
from tests.golden.data_sources import replacements
from tests.golden.edm_generate import classes_of
from tests.golden.edm_training import image_shape, start_kimg
from tests.golden.metasemi_cases import conv_large, network_of
from tests.golden.recipes import computed
from tests.golden.torchssl_networks import network_of as network_with
from TorchSSL.core.networks import build_network


@pytest.mark.parametrize("given", [[3, 4], [[3, 4]], {"from": 3, "to": 4}, {"3": 4}])
def test_replaced_labels(given: Any) -> None:
    assert replacements(given) == [(3, 4)]


@pytest.mark.parametrize(("recipe", "drawn"), [
    ("default_rng(7).choice([0, 1, 2, 2], size=50)", np.random.default_rng(7).choice([0, 1, 2, 2], size=50)),
    ("RandomState(3).randint(0, 4, 50)", np.random.RandomState(3).randint(0, 4, 50)),
    ("default_rng(6).choice(4, 50, p=[0.4, 0.6, 0, 0])", np.random.default_rng(6).choice(4, 50, p=[0.4, 0.6, 0, 0]))])
def test_label_recipes(recipe: str, drawn: np.ndarray) -> None:
    assert np.array_equal(computed(f"numpy.random.{recipe}"), drawn)


def test_words_of_edm_cases() -> None:
    assert classes_of({"description": "one integer below 7 (class)"}) == classes_of({"num_classes": 7}) == 7
    assert start_kimg({"resume_kimg": 3}) == 3 and start_kimg({}) == 0
    assert image_shape({"description": "status lines (images 4x4x1)"}) == (4, 1)


def test_layers_of_metasemi() -> None:
    case = {"network": "Sequential of: 0 Conv2d(1->4,k3,p1), 1 MaxPool2d(2), 2 Flatten, 3 Linear(16->6, no bias), "
                       "4 BatchNorm1d(6), 5 LeakyReLU(0.2), 6 Linear(6->num_classes); names are \"<index>.<tensor>\"",
            "state_shapes": {"0.weight": [4, 1, 3, 3], "0.bias": [4], "3.weight": [6, 16], "4.weight": [6],
                             "6.weight": [5, 6], "6.bias": [5]}}
    net = network_of(case)
    assert net[3].bias is None and isinstance(net[4], nn.BatchNorm1d) and net[5].negative_slope == 0.2
    assert net(torch.zeros(2, 1, 4, 4)).shape == (2, 5)
    assert conv_large("ConvLarge", 1, 7)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("lacks", ["", "weight_uniform_bound_default"])
@pytest.mark.parametrize(("kind", "classes", "sizes"), [
    ("WideResNet", 7, {"depth": 16, "widen_factor": 3}), ("WideResNetVar", 12, {"depth": 10, "widen_factor": 1}),
    ("ResNet50", 6, {})])
def test_layers_of_torchssl(kind: str, classes: int, sizes: dict[str, int], lacks: str) -> None:
    with torch.device("meta"):
        net = build_network(kind, classes, **sizes)
    layers = {name: {"kind": "conv", "weight_std_expected": math.sqrt(2 / math.prod(layer.weight.shape) *
                                                                      layer.in_channels)}
              for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
    layers["fc"] = {"kind": "linear", "weight_uniform_bound_default": net.fc.in_features ** -0.5,
                    "weight_std_xavier": math.sqrt(2 / (net.fc.in_features + classes))}
    layers["fc"].pop(lacks, None)
    found = network_with(layers)
    assert [tensor.shape for tensor in found.parameters()] == [tensor.shape for tensor in net.parameters()]


def test_absent_keys_are_cases_less() -> None:
    with pytest.raises(pytest.skip.Exception, match="tdsm: a has no 'tolerance'"):
        Stored("tdsm: a", {"case": "a"})["tolerance"]
