"""Losses on labelled images, accuracies, evaluation and its median."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib import losses
from DASO.lib.config.config import Config
from DASO.lib.evaluation import accuracy, class_accuracies, metrics
from DASO.lib.report import extend_history
from tests.golden.cases import arrays
from tests.golden.daso_cases import each, of_file, serves, stored, tolerance

CASES = {case["name"]: case for case in of_file("losses.npz")}
SERVES = serves([CASES[name] for name in ("loss", "acc", "evalloop", "median")])


def tensors(values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    found = {name: torch.from_numpy(np.asarray(value)) for name, value in values.items()}
    return {name: value.long() if name.endswith("labels") else value for name, value in found.items()}


@each([CASES["loss"]])
def test_losses(case: dict[str, Any]) -> None:
    wanted = stored(case)
    given = tensors({name: value for name, value in wanted.items() if name.startswith("in_")})
    labels, soft, weight = given["in_labels"], given["in_soft"], given["in_weight"]
    logits = given["in_logits"].clone().requires_grad_()
    counts = given["in_counts"].tolist()
    prior = given["in_counts"] / given["in_counts"].sum()
    found = {"ce": losses.cross_entropy(logits, labels), "ce_soft": losses.cross_entropy(logits, soft),
             "ce_weight_mean": losses.cross_entropy(logits, labels, weight),
             "ce_weight_avg7": 1.5 * losses.cross_entropy(logits, labels, weight) * len(labels) / 7,
             "ce_zero_weight": losses.cross_entropy(logits, labels, torch.zeros_like(weight)),
             "ldam_margins": losses.ldam_margins(counts),
             "ldam_unweighted": losses.ldam(logits, labels, losses.ldam_margins(counts)),
             "mse50": 50 * F.mse_loss(logits.softmax(1), soft)}
    for key in wanted:
        if key.startswith("logit_adjusted_tau"):
            cfg = Config({"ALGORITHM.LOGIT_ADJUST.APPLY": True,
                          "ALGORITHM.LOGIT_ADJUST.TAU": float(key.removeprefix("logit_adjusted_tau"))})
            found[key] = losses.cross_entropy(losses.adjusted(logits, cfg, prior), labels)
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
            np.testing.assert_allclose(found[name].detach(), value, **tolerance(case), err_msg=name)


@each([CASES["acc"]])
def test_accuracy(case: dict[str, Any]) -> None:
    wanted = stored(case)
    given = tensors({name: arrays("daso", case["file"])[f"loss/{name}"] for name in ("in_logits", "in_labels")})
    logits, labels = given["in_logits"], given["in_labels"]
    np.testing.assert_allclose(torch.stack(accuracy(logits, labels)), wanted["top1_top5"], **tolerance(case))
    found = class_accuracies(logits, labels).numpy()
    present = np.flatnonzero(~np.isnan(found))
    np.testing.assert_array_equal(present, wanted["classwise_ids"])
    np.testing.assert_allclose(found[present], wanted["classwise"], **tolerance(case))


@each([CASES["evalloop"]])
def test_evaluation(case: dict[str, Any]) -> None:
    wanted = stored(case)
    given = tensors({name: wanted[name] for name in ("in_logits", "in_labels", "prior")})
    prior = given["prior"] / given["prior"].sum()
    found = metrics(given["in_logits"], given["in_labels"], prior, "test")
    for name, value in wanted.items():
        if name.startswith("out/"):
            key = name.removeprefix("out/").removeprefix("classwise/")
            np.testing.assert_allclose(found[key if "/" in key else f"test/{key}"], value, **tolerance(case),
                                       err_msg=name)


@each([CASES["median"]])
def test_median(case: dict[str, Any]) -> None:
    wanted, history = stored(case), {}
    found = [extend_history(history, {"test/top1": float(value), "test/top1_la": 0.0}, "test")["test/top1_median20"]
             for value in wanted["in"]]
    np.testing.assert_allclose(found, wanted["out"], **tolerance(case))
