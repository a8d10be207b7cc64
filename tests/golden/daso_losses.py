"""Losses on labelled images, accuracies, evaluation and its median."""
from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib import losses
from DASO.lib.config.config import Config
from DASO.lib.evaluation import accuracy, class_accuracies, metrics
from DASO.lib.report import extend_history
from tests.golden.cases import each, number, serves, whole
from tests.golden.daso_cases import Case, cases_of, close, named_array, stored

LOSSES, ACCURACIES = cases_of("losses"), cases_of("accuracy")
EVALUATIONS, MEDIANS = cases_of("evaluation"), cases_of("median")
SERVES = serves(LOSSES, ACCURACIES, EVALUATIONS, MEDIANS)


def tensors(values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    found = {name: torch.from_numpy(np.asarray(value)) for name, value in values.items()}
    return {name: value.long() if name.endswith("labels") else value for name, value in found.items()}


@each(LOSSES)
def test_losses(case: Case) -> None:
    wanted = stored(case)
    given = tensors({name: value for name, value in wanted.items() if name.startswith("in_")})
    labels, soft, weight = given["in_labels"], given["in_soft"], given["in_weight"]
    logits = given["in_logits"].clone().requires_grad_()
    counts = given["in_counts"].tolist()
    prior = given["in_counts"] / given["in_counts"].sum()
    found = {"ce": losses.cross_entropy(logits, labels), "ce_soft": losses.cross_entropy(logits, soft),
             "ce_weight_mean": losses.cross_entropy(logits, labels, weight),
             "ce_zero_weight": losses.cross_entropy(logits, labels, torch.zeros_like(weight)),
             "ldam_margins": losses.ldam_margins(counts),
             "ldam_unweighted": losses.ldam(logits, labels, losses.ldam_margins(counts))}
    for key in wanted:
        if key.startswith("logit_adjusted_tau"):
            cfg = Config({"ALGORITHM.LOGIT_ADJUST.APPLY": True,
                          "ALGORITHM.LOGIT_ADJUST.TAU": float(key.removeprefix("logit_adjusted_tau"))})
            found[key] = losses.cross_entropy(losses.adjusted(logits, cfg, prior), labels)
        elif factor := re.fullmatch(r"mse([\d.]+)", key):
            found[key] = float(factor[1]) * F.mse_loss(logits.softmax(1), soft)
        elif factor := re.fullmatch(r"ce_weight_avg([\d.]+)", key):
            share = number(case["what"], "loss_weight #") * len(labels) / float(factor[1])
            found[key] = share * losses.cross_entropy(logits, labels, weight)
        elif parts := re.fullmatch(r"cb_(weights|CE|LDAM)_beta([\d.]+)(_grad)?", key):
            kind, beta, is_gradient = parts.groups()
            if kind == "weights":
                found[key] = losses.class_weights(counts, float(beta))
                continue
            loss = losses.labelled_loss(Config({
                "MODEL.LOSS.WITH_LABELED_COST_SENSITIVE": True, "MODEL.LOSS.WARMUP_ITERS": 1,
                "MODEL.LOSS.COST_SENSITIVE.BETA": float(beta),
                "MODEL.LOSS.COST_SENSITIVE.LOSS_OVERRIDE": "LDAM" if kind == "LDAM" else ""}), counts)
            value = loss(logits, labels, 0)
            found[key] = torch.autograd.grad(value, logits)[0] if is_gradient else value
    for name, value in wanted.items():
        if not name.startswith("in_"):
            close(found[name], value, case, name)


@each(ACCURACIES)
def test_accuracy(case: Case) -> None:
    wanted = stored(case)
    logits = torch.from_numpy(named_array(case, r"\bon ([^\s,]+),"))
    labels = torch.from_numpy(named_array(case, r"\bon [^\s,]+, ([^\s,]+)")).long()
    close(torch.stack(accuracy(logits, labels)), wanted["top1_top5"], case, "top-1 and top-5")
    found = class_accuracies(logits, labels).numpy()
    present = np.flatnonzero(~np.isnan(found))
    np.testing.assert_array_equal(present, wanted["classwise_ids"])
    close(found[present], wanted["classwise"], case, "by class")


@each(EVALUATIONS)
def test_evaluation(case: Case) -> None:
    wanted = stored(case)
    given = tensors({name: wanted[name] for name in ("in_logits", "in_labels", "prior")})
    prior = given["prior"] / given["prior"].sum()
    found = metrics(given["in_logits"], given["in_labels"], prior, "test")
    for name, value in wanted.items():
        if name.startswith("out/"):
            key = name.removeprefix("out/").removeprefix("classwise/")
            close(found[key if "/" in key else f"test/{key}"], value, case, name)


@each(MEDIANS)
def test_median(case: Case) -> None:
    wanted, history = stored(case), {}
    name = f"test/top1_median{whole(case['what'], 'last #')}"
    found = [extend_history(history, {"test/top1": float(value), "test/top1_la": 0.0}, "test")[name]
             for value in wanted["in"]]
    close(found, wanted["out"], case, name)
