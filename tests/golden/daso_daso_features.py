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
from tests.golden.cases import each, fill, number, numbers, serves, whole
from tests.golden.daso_cases import Case, Recipe, cases_of, close, of_step, stored

QUEUES, STEPS = cases_of("queue"), cases_of("daso step")
SERVES = serves(QUEUES, STEPS)


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


def watch(semantics: Semantics) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return a list to which every call of `semantics.blend` adds what it returns."""
    found, blend = [], semantics.blend

    def remember(*given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        found.append(blend(*given))
        return found[-1]

    semantics.blend = remember
    return found


@each(STEPS)
def test_daso_step(case: Case) -> None:
    given, wanted = case["ctor"], stored(case)
    classes, nl, nu, first = given["K"], given["nl"], given["nu"], given["iter0"]
    keys = {key: value for key, value in given.items() if "." in key}
    pretraining = 1 + whole(case["what"], "pretraining only in step #", -1)
    cfg = Config({"ALGORITHM.NAME": "DASO", "ALGORITHM.CONFIDENCE_THRESHOLD": given["threshold"],
                  "MODEL.QUEUE.MAX_SIZE": given["queue_max"], "ALGORITHM.LOGIT_ADJUST.APPLY": given["logit_adjust"],
                  "ALGORITHM.ABC.APPLY": given["abc"], "ALGORITHM.ABC.DASO_PSEUDO_LABEL": given["abc_daso_pl"],
                  "ALGORITHM.DASO.PRETRAIN_STEPS": first + pretraining,
                  "ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD": whole(case["what"], r"\(period #", 1), **keys})
    recipe = Recipe(case["recipe"], K=classes, nl=nl, nu=nu, concat=1)
    size = recipe.known["cent"].shape[1]
    learner = DASO(cfg, Setting(classes, tuple(int(count) for count in given["counts"]), feature_size=size))
    learner.model = fill(SemiModel(Features(size), classes, balanced=given["abc"]))
    blended = watch(learner.semantics)
    scale = np.float32(number(case["recipe"], r"x=#\*concat", 1))
    for step in range(1 + max(int(key[2:key.index("/")]) for key in wanted)):
        drawn = recipe.step()
        x = torch.from_numpy(scale * np.concatenate([drawn[name] for name in ("lf", "wk", "sg")])).requires_grad_()
        labels, taught = torch.from_numpy(drawn["y"]), torch.from_numpy(np.float32(drawn["part"]))
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
        expected = of_step(wanted, step)
        assert {key for key in expected if key.startswith("loss_")} == set(found.losses), step
        for name, value in expected.items():
            close(values[name], value, case, f"{name}, step {step}")


@each(QUEUES)
def test_queue(case: Case) -> None:
    wanted, said = stored(case), case["what"]
    for kind in dict.fromkeys(key.split("_st")[0] for key in wanted):
        # "'NAME' has class sizes [3,2] (capacity 5x each)"; others have one size for all classes.
        by_class = re.search(rf"'{kind}' has class sizes \[([\d, ]+)\] \(capacity (\d+)x", said)
        capacity = [int(by_class[2]) * size for size in numbers(by_class[1])] if by_class else \
            whole(said, r"MAX_SIZE\W*#")
        steps = [key for key in wanted if key.startswith(f"{kind}_st") and key.endswith("_feat")]
        queue = FeatureQueue(len(wanted[f"{kind}_st0_sizes"]), capacity, wanted[steps[0]].shape[1])
        for step in range(len(steps)):
            at = f"{kind}_st{step}"
            queue.push(torch.from_numpy(wanted[f"{at}_feat"]), torch.from_numpy(wanted[f"{at}_y"]).long())
            np.testing.assert_array_equal(queue.sizes, wanted[f"{at}_sizes"], err_msg=at)
            close(queue.prototypes, wanted[f"{at}_proto"], case, at)
