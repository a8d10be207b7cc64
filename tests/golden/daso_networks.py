"""Networks: names and shapes, features and logits, running statistics."""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from DASO.lib.config.config import Config
from DASO.lib.models.ema import PREFIX, ModelEMA
from DASO.lib.models.semi import SemiModel, build_model
from tests.golden.cases import DEVICE, each, facts, fill, serves, whole
from tests.golden.daso_cases import PAPER, Case, cases_of, close, stored
from tests.golden.recipes import Normal, computed

NETWORKS = cases_of("network")
SERVES = serves(NETWORKS)
# Which learner has the network of a name.
LEARNERS = {"SemiModel": "FixMatch", "ABCModel": "FixMatchABC", "DASOModel": "DASO", "USADTMModel": "USADTM"}


def network(case: Case) -> SemiModel:
    learner = LEARNERS[case["what"].split()[0]]
    return fill(build_model(Config({**case["ctor"], "ALGORITHM.NAME": learner})))


@each(NETWORKS)
def test_forward(case: Case) -> None:
    wanted, net = stored(case), network(case)
    normal = Normal(np.random.default_rng(whole(case["input"], "seed #")))
    x = torch.from_numpy(computed(re.search(r"normal\(\([^)]*\)\)", case["input"])[0], normal=normal)).to(DEVICE)
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
        close(here, value, case, name)


def described(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Return the state of the network, or of the average of one, whose tensors have these names and shapes."""
    plain = {name.removeprefix(PREFIX): shape for name, shape in shapes.items()}
    cfg = Config({"ALGORITHM.NAME": "FixMatchABC" if "abc_classifier.classifier.weight" in plain else "FixMatch",
                  "MODEL.WIDTH": plain["encoder.unit4.0.weight"][0] // 64,
                  "MODEL.NUM_CLASSES": plain["classifier.classifier.weight"][0],
                  "MODEL.WITH_ROTATION_HEAD": "projection.projections.weight" in plain})
    net = build_model(cfg, plain["encoder.init_conv.weight"][1])
    return (ModelEMA(net) if plain.keys() != shapes.keys() else net).state_dict()


@pytest.mark.parametrize("name", facts(PAPER, "networks_state.json"))
def test_names_and_shapes(name: str) -> None:
    shapes = facts(PAPER, "networks_state.json")[name]
    assert [(key, list(value.shape)) for key, value in described(shapes).items()] == list(shapes.items())
