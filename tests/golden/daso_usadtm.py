"""USADTM on given features, and its mutual information."""
from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from DASO.lib.algorithm.interface import Batch, Draws, Setting
from DASO.lib.algorithm.usadtm import USADTM, mutual_information, triplet_mutual_information
from DASO.lib.config.config import Config
from DASO.lib.data.sets import long_tail_counts
from DASO.lib.models.semi import SemiModel
from shared.distributed import World
from tests.golden.cases import arrays, fill
from tests.golden.daso_cases import of_file, serves, tolerance

CASES = of_file("usadtm.npz")
INFORMATION = [case for case in of_file("losses.npz") if case["name"] == "mi"]
SERVES = serves(CASES + INFORMATION)


class Identity(nn.Module):
    """An encoder whose features are its inputs [N, D]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.feature_size = size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def scales(recipe: str) -> SimpleNamespace:
    """Return the numbers of a recipe of features."""
    seed, size = re.search(r"seed (\d+); cent=normal\(\(K,(\d+)\)\)", recipe).groups()
    base, weak, strong = (re.search(rf"{name}=\S+\+([\d.]+)\*normal", recipe)[1] for name in ("base", "weak", "strong"))
    return SimpleNamespace(seed=int(seed), size=int(size), base=float(base), weak=float(weak), strong=float(strong))


def test_usadtm() -> None:
    for case in CASES:
        name, given, stored = case["name"], case["ctor"], arrays("daso", case["file"])
        noise, classes = scales(case["recipe"]), given["K"]
        counts = long_tail_counts(given["N1"], given["gamma_l"], classes)
        setting = Setting(classes, tuple(counts.tolist()), feature_size=noise.size)
        pretraining = int(re.search(r"pretraining only in step (\d+)", case["what"])[1])
        learner = USADTM(Config({"ALGORITHM.NAME": "USADTM", "ALGORITHM.USADTM.DTM_THRES": given["DTM_THRES"],
                                 "ALGORITHM.USADTM.UC_LOSS_WEIGHT": given["UC_LOSS_WEIGHT"],
                                 "ALGORITHM.USADTM.PRETRAIN_STEPS": 1 + pretraining}), setting)
        learner.model = fill(SemiModel(Identity(noise.size), classes))

        rng = np.random.default_rng(noise.seed)

        def normal(*shape: int, rng: np.random.Generator = rng) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        centres = normal(classes, noise.size)
        for step in range(len({key.split("/")[1] for key in case["keys"]})):
            labels = rng.integers(0, classes, given["nl"])
            labelled = centres[labels] + normal(given["nl"], noise.size)
            truth = rng.integers(0, classes, given["nu"])
            base = centres[truth] + np.float32(noise.base) * normal(given["nu"], noise.size)
            weak = base + np.float32(noise.weak) * normal(given["nu"], noise.size)
            strong = base + np.float32(noise.strong) * normal(given["nu"], noise.size)
            inputs = [torch.from_numpy(part).requires_grad_() for part in (labelled, base, weak, strong)]
            found = learner.losses(Batch(inputs[0], torch.from_numpy(labels), tuple(inputs[1:])), step, Draws(0, step))
            sum(found.losses.values()).backward()
            values = {**{key: loss.detach() for key, loss in found.losses.items()},
                      "grad_x": torch.cat([part.grad for part in inputs]), "prototypes": learner.queue.prototypes,
                      "queue_sizes": learner.queue.sizes, "pseudo_labels": found.pseudo_labels.get("main"),
                      "mask": found.mask}
            for key in (key for key in case["keys"] if key.startswith(f"{name}/st{step}/")):
                np.testing.assert_allclose(values[key.rpartition("/")[2]], stored[key], **tolerance(case), err_msg=key)


def test_mutual_information() -> None:
    for case in INFORMATION:
        stored = {key.partition("/")[2]: arrays("daso", case["file"])[key] for key in case["keys"]}
        x, y, z = (torch.from_numpy(stored[f"in_{name}"]) for name in "xyz")
        np.testing.assert_allclose(mutual_information(x, y, World()), stored["pair_xy"], **tolerance(case))
        loss = triplet_mutual_information(x.requires_grad_(), y, z, World())
        loss.backward()
        np.testing.assert_allclose(loss.detach(), stored["triplet"], **tolerance(case))
        np.testing.assert_allclose(x.grad, stored["grad_x"], **tolerance(case))
