"""DASO on given features: losses, gradients, pseudo-labels, queue and histogram; the queue by itself."""
from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from DASO.lib.algorithm.daso import DASO, FeatureQueue, Semantics
from DASO.lib.algorithm.interface import Batch, Draws, Setting
from DASO.lib.config.config import Config
from DASO.lib.models.semi import SemiModel
from tests.golden.cases import fill
from tests.golden.daso_cases import each, normal, numbers, of_file, serves, stored, tolerance

CASES = of_file("daso_features.npz")
QUEUES = [case for case in CASES if case["name"] == "queue"]
STEPS = [case for case in CASES if "ctor" in case]
SERVES = serves(QUEUES + STEPS)


class Features(nn.Identity):
    """An encoder whose features are its inputs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.feature_size = size


class StoredDraws(Draws):
    """Gives masks as they were drawn, in the order of calls."""

    def __init__(self, values: dict[str, np.ndarray], step: int) -> None:
        super().__init__(0, 0)
        names = sorted(name for name in values if name.startswith(f"st{step}/draw"))
        self.values = [torch.from_numpy(np.asarray(values[name])) for name in names]

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.values[self.calls - 1].to(probability.dtype)


def recipe(case: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a recipe: seed, feature size, the three scales of noise, the scales of both kinds."""
    text = case["recipe"]
    found = re.search(r"seed (\d+); cent=normal\(\(K,(\d+)\)\).*ef=lf\+([\d.]+)\*normal.*wk=base\+([\d.]+)\*normal; "
                      r"sg=base\+([\d.]+)\*normal; x=([\d.]+)\*concat.*labelled part=([\d.]+)\*ef", text).groups()
    return dict(zip(("seed", "size", "teacher", "weak", "strong", "x", "ef"), map(float, found), strict=True))


def watch(semantics: Semantics) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return a list to which every call of `semantics.blend` adds what it returns."""
    found, blend = [], semantics.blend

    def remember(*given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        found.append(blend(*given))
        return found[-1]

    semantics.blend = remember
    return found


@each(STEPS)
def test_daso_step(case: dict[str, Any]) -> None:
    given, wanted, scale = case["ctor"], stored(case), recipe(case)
    classes, nl, nu, size, first = given["K"], given["nl"], given["nu"], int(scale["size"]), given["iter0"]
    keys = {key: value for key, value in given.items() if "." in key}
    cfg = Config({"ALGORITHM.NAME": "DASO", "ALGORITHM.CONFIDENCE_THRESHOLD": given["threshold"],
                  "MODEL.QUEUE.MAX_SIZE": given["queue_max"], "ALGORITHM.LOGIT_ADJUST.APPLY": given["logit_adjust"],
                  "ALGORITHM.ABC.APPLY": given["abc"], "ALGORITHM.ABC.DASO_PSEUDO_LABEL": given["abc_daso_pl"],
                  "ALGORITHM.DASO.PRETRAIN_STEPS": first + 1, "ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD": 1, **keys})
    learner = DASO(cfg, Setting(classes, tuple(int(count) for count in given["counts"]), feature_size=size))
    learner.model = fill(SemiModel(Features(size), classes, balanced=given["abc"]))
    blended = watch(learner.semantics)
    rng = np.random.default_rng(int(scale["seed"]))
    centres = normal(rng, classes, size)
    for step in range(1 + max(int(key[2:key.index("/")]) for key in wanted)):
        labels = rng.integers(0, classes - 1, nl)
        labelled = centres[labels] + normal(rng, nl, size)
        teacher = labelled + np.float32(scale["teacher"]) * normal(rng, nl, size)
        base = centres[rng.integers(0, classes, nu)] + normal(rng, nu, size)
        weak = base + np.float32(scale["weak"]) * normal(rng, nu, size)
        strong = base + np.float32(scale["strong"]) * normal(rng, nu, size)
        x = torch.from_numpy(np.float32(scale["x"]) * np.concatenate([labelled, weak, strong])).requires_grad_()
        labels, taught = torch.from_numpy(labels), torch.from_numpy(np.float32(scale["ef"]) * teacher)
        learner.teacher = SimpleNamespace(encoder=lambda images, taught=taught: taught)
        found = learner.losses(Batch(x[:nl], labels, (x[nl:nl + nu], x[nl + nu:])), first + step,
                               StoredDraws(wanted, step))
        learner.model.zero_grad()
        sum(found.losses.values()).backward()
        head = learner.model.classifier.classifier
        values = {**found.losses, "grad_x": x.grad, "grad_classifier_w": head.weight.grad,
                  "linear_pl": found.pseudo_labels["linear"], "sem_pl": found.pseudo_labels["semantic"],
                  "pseudo_labels": found.pseudo_labels["main"], "pl_confidence": blended[-1][0].amax(1),
                  "prototypes": learner.semantics.queue.prototypes, "queue_sizes": learner.semantics.queue.sizes,
                  "pl_dist_after": learner.semantics.blender.histogram}
        if given["abc"]:
            values["grad_abc_w"] = learner.model.abc_classifier.classifier.weight.grad
        expected = {key.partition("/")[2]: value for key, value in wanted.items() if key.startswith(f"st{step}/")
                    and "/draw" not in key}
        assert {key for key in expected if key.startswith("loss_")} == set(found.losses), step
        for name, value in expected.items():
            np.testing.assert_allclose(values[name].detach(), value, **tolerance(case), err_msg=f"{name}, step {step}")


@each(QUEUES)
def test_queue(case: dict[str, Any]) -> None:
    wanted = stored(case)
    plain = int(re.search(r"MAX_SIZE (\d+)", case["what"])[1])
    factor = int(re.search(r"capacity (\d+)x", case["what"])[1])
    sizes = numbers(re.search(r"\[([\d,]+)\]", case["what"])[1])
    for kind in dict.fromkeys(key.split("_st")[0] for key in wanted):
        steps = [key for key in wanted if key.startswith(f"{kind}_st") and key.endswith("_feat")]
        first = wanted[steps[0]]
        classes = len(wanted[f"{kind}_st0_sizes"])
        capacity = [factor * size for size in sizes] if kind.startswith("classwise") else plain
        queue = FeatureQueue(classes, capacity, first.shape[1])
        for step in range(len(steps)):
            at = f"{kind}_st{step}"
            queue.push(torch.from_numpy(wanted[f"{at}_feat"]), torch.from_numpy(wanted[f"{at}_y"]).long())
            np.testing.assert_array_equal(queue.sizes, wanted[f"{at}_sizes"], err_msg=at)
            np.testing.assert_allclose(queue.prototypes, wanted[f"{at}_proto"], **tolerance(case), err_msg=at)
