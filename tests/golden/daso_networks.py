"""Networks: names and shapes, features and logits, running statistics."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from DASO.lib.config.config import Config
from DASO.lib.models.ema import ModelEMA
from DASO.lib.models.semi import SemiModel, build_model
from tests.golden.cases import facts, fill
from tests.golden.daso_cases import each, normal, numbers, of_file, serves, stored, tolerance

CASES = of_file("networks.npz")
SERVES = serves(CASES)
# Which learner has the network of a name.
LEARNERS = {"SemiModel": "FixMatch", "ABCModel": "FixMatchABC", "DASOModel": "DASO", "USADTMModel": "USADTM"}


def network(case: dict[str, Any]) -> SemiModel:
    learner = LEARNERS[case["what"].split()[0]]
    return fill(build_model(Config({**case["ctor"], "ALGORITHM.NAME": learner})))


@each(CASES)
def test_forward(case: dict[str, Any]) -> None:
    wanted, net = stored(case), network(case)
    shape = numbers(case["input"][:case["input"].index("seed")])
    x = torch.from_numpy(normal(np.random.default_rng(numbers(case["input"])[-1]), *shape))
    found = {}
    with torch.no_grad():
        for mode in "eval", "train":
            net.train(mode == "train")
            features = net.encoder(x)
            found[f"features_{mode}"] = features
            # Whoever has a second classifier measures that one.
            found[f"logits_{mode}"] = net.abc_classifier(features) if mode == "eval" and net.balanced else \
                net.classifier(features)
            if hasattr(net, "projection"):
                found[f"rotation_{mode}"] = net.projection(features)
            if mode == "eval":
                found["main_logits_eval"] = net.classifier(features)
    state = net.state_dict()
    for name, value in wanted.items():
        here = state[name.removeprefix("after1train/")] if name.startswith("after1train/") else found[name]
        np.testing.assert_allclose(here, value, **tolerance(case), err_msg=name)


def described(name: str) -> dict[str, torch.Tensor]:
    """Return the state of the network that an entry of networks_state.json names: wrn_w2_k100_rot, daso_abc_w2_k10."""
    parts = name.removeprefix("ema_of_").split("_")
    sizes = {part[0]: int(part[1:]) for part in parts if part[1:].isdigit()}
    learner = {"abc": "FixMatchABC", "daso": "DASO", "usadtm": "USADTM"}.get(parts[0], "FixMatch")
    cfg = Config({"ALGORITHM.NAME": learner, "ALGORITHM.ABC.APPLY": "abc" in parts, "MODEL.WIDTH": sizes["w"],
                  "MODEL.NUM_CLASSES": sizes["k"], "MODEL.WITH_ROTATION_HEAD": "rot" in parts})
    net = build_model(cfg)
    return ModelEMA(net).state_dict() if name.startswith("ema_of_") else net.state_dict()


@pytest.mark.parametrize("name", facts("daso", "networks_state.json"))
def test_names_and_shapes(name: str) -> None:
    found = [[key, list(value.shape)] for key, value in described(name).items()]
    assert found == [[key, shape] for key, shape in facts("daso", "networks_state.json")[name].items()]
