"""USADTM on given features, and its mutual information."""
from __future__ import annotations

import torch
from torch import nn

from DASO.lib.algorithm.interface import Batch, Draws, Setting
from DASO.lib.algorithm.usadtm import USADTM, mutual_information, triplet_mutual_information
from DASO.lib.config.config import Config
from DASO.lib.data.sets import long_tail_counts
from DASO.lib.models.semi import SemiModel
from shared.distributed import World
from tests.golden.cases import each, fill, serves, whole
from tests.golden.daso_cases import Case, Recipe, cases_of, close, of_step, stored

STEPS, INFORMATION = cases_of("usadtm step"), cases_of("mutual information")
SERVES = serves(STEPS, INFORMATION)


class Identity(nn.Module):
    """An encoder whose features are its inputs [N, D]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.feature_size = size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@each(STEPS)
def test_usadtm(case: Case) -> None:
    given, wanted, classes = case["ctor"], stored(case), case["ctor"]["K"]
    recipe = Recipe(case["recipe"], K=classes, nl=given["nl"], nu=given["nu"])
    size = recipe.known["cent"].shape[1]
    counts = long_tail_counts(given["N1"], given["gamma_l"], classes)
    setting = Setting(classes, tuple(counts.tolist()), feature_size=size)
    pretraining = 1 + whole(case["what"], "pretraining only in step #", -1)
    learner = USADTM(Config({"ALGORITHM.NAME": "USADTM", "ALGORITHM.USADTM.DTM_THRES": given["DTM_THRES"],
                             "ALGORITHM.USADTM.UC_LOSS_WEIGHT": given["UC_LOSS_WEIGHT"],
                             "ALGORITHM.USADTM.PRETRAIN_STEPS": pretraining}), setting)
    learner.model = fill(SemiModel(Identity(size), classes))
    for step in range(len({key.split("/")[0] for key in wanted})):
        drawn = recipe.step()
        views = (drawn[name] for name in ("lf", "identity", "weak", "strong"))
        inputs = [torch.tensor(view, requires_grad=True) for view in views]
        batch = Batch(inputs[0], torch.from_numpy(drawn["y"]), tuple(inputs[1:]))
        found = learner.losses(batch, step, Draws(0, step))
        sum(found.losses.values()).backward()
        values = {**found.losses, "grad_x": torch.cat([part.grad for part in inputs]), "mask": found.mask,
                  "prototypes": learner.queue.prototypes, "queue_sizes": learner.queue.sizes,
                  "pseudo_labels": found.pseudo_labels.get("main")}
        for name, value in of_step(wanted, step).items():
            close(values[name], value, case, f"{name}, step {step}")


@each(INFORMATION)
def test_mutual_information(case: Case) -> None:
    wanted = stored(case)
    x, y, z = (torch.from_numpy(wanted[f"in_{name}"]) for name in "xyz")
    found = {"pair_xy": mutual_information(x, y, World())}
    found["triplet"] = triplet_mutual_information(x.requires_grad_(), y, z, World())
    found["triplet"].backward()
    found["grad_x"] = x.grad
    for name in found.keys() & wanted.keys():
        close(found[name], wanted[name], case, name)
