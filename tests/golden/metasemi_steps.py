"""Recorded training of the small-data scripts: our step on the recorded batches gives the recorded numbers."""
from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
import torch

from MetaSemi import train_baseline, train_meta
from MetaSemi.core.evaluation import evaluate
from MetaSemi.core.meta import (
    MetaGradient,
    StepResult,
    compute_weight,
    learning_rate,
    meta_step,
    pseudo_labels,
    supervised_step,
)
from shared.distributed import World
from tests.golden.cases import each, fill_value
from tests.golden.metasemi_cases import Case, Tolerances, cases_of, network_of, parts, stored, tensor

SCRIPTS = {"train_meta.py": train_meta, "train_baseline.py": train_baseline}
TRAININGS = [case for case in cases_of("training") if case.get("script") in SCRIPTS]
EXACT = [case for case in TRAININGS if "meta_grad_exact" in stored(case)]
SERVES = {("training", case["name"]) for case in TRAININGS}
# Arrays that are given, and those that are compared.
GIVEN = {"label_img", "label_gt", "unlabel_img", "unlabel_gt", "lam", "test_img", "test_gt"}
COMPARED = {"lr", "weight", "unlabel_prob", "test_acc", "loss", "label_loss", "label_logits", "interp_loss",
            "interp_target", "interp_logits", "unlabel_loss", "train_unlabel_logits", "label_eval_logits",
            "unlabel_eval_logits", "grad_norm", "epsilon", "logits_pos", "logits_neg", "meta_grad", "meta_grad_exact",
            "pseudo", "dtheta0", "dtheta0_stats", "state", "state_stats", "momentum", "grad0", "grad0_stats"}


def options_of(case: Case) -> argparse.Namespace:
    return SCRIPTS[case["script"]].parse(case["flags"])


def optimizer_of(net: torch.nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=options.lr, momentum=options.momentum,
                           weight_decay=options.weight_decay, fused=True)


def batch_of(case: Case, k: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor(case, name, k) for name in ("label_img", "label_gt", "unlabel_img"))


def rows(values: dict[str, torch.Tensor]) -> np.ndarray:
    """Return (sum, L2 norm, dot with the probe) of each tensor, in float64."""
    found = []
    for name, value in values.items():
        flat = value.detach().double().flatten().numpy()
        found.append([flat.sum(), np.linalg.norm(flat), flat @ fill_value(f"probe.{name}", (flat.size,))])
    return np.array(found)


@each(TRAININGS)
def test_steps(case: Case) -> None:
    options, net, wanted, tolerances = options_of(case), network_of(case), stored(case), Tolerances(case)
    assert {key.partition("/")[0] for key in wanted} <= GIVEN | COMPARED
    assert list(net.state_dict()) == case["state_order"]
    assert [key for key, _ in net.named_parameters()] == case["param_order"]
    optimizer, best = optimizer_of(net, options), 0.0
    batches = list(zip(*(map(torch.from_numpy, wanted[key]) for key in ("test_img", "test_gt")), strict=True))
    for k in range(case["steps"]):
        step = case["first_step"] + k
        rate = learning_rate(step, options.lr, options.warmup, options.gamma, options.milestones)
        lam = tensor(case, "lam", k) if options.mix_up else None
        found = {"lr": rate}
        if case["script"] == "train_meta.py":
            weight = compute_weight(options.weight, step, options.warmup)
            result = meta_step(net, optimizer, *batch_of(case, k), rate=rate, weight=weight, lam=lam,
                               meta=MetaGradient(options.epsilon))
            found |= {"weight": weight, **of_meta_step(result)}
            compare_meta(result, case, k, rate, tolerances)
        else:
            result = supervised_step(net, optimizer, *batch_of(case, k), rate=rate, lam=lam)
            if lam is not None:
                found["unlabel_prob"] = result.pseudo.targets
        for key, value in {**found, **of_step(result)}.items():
            if key in wanted:
                tolerances.close(value, wanted[key][k], key)
        compare_state(net, optimizer, case, k, tolerances)
        if (step + 1) % options.test_freq == 0 or step + 1 == options.total_steps:
            best = max(best, evaluate(net, batches, World())[0])
    assert best == pytest.approx(float(wanted["test_acc"]), abs=1e-3)


def of_step(result: StepResult) -> dict[str, Any]:
    return {"loss": result.loss, "label_loss": result.label_loss, "label_logits": result.label_logits,
            "interp_loss": result.interp_loss, "interp_target": result.interp_target,
            "interp_logits": result.interp_logits}


def of_meta_step(result: StepResult) -> dict[str, Any]:
    pseudo = result.pseudo
    return {"unlabel_loss": result.unlabel_loss, "train_unlabel_logits": result.unlabel_logits,
            "label_eval_logits": pseudo.label_logits, "unlabel_eval_logits": pseudo.unlabel_logits,
            "grad_norm": pseudo.norm, "epsilon": pseudo.step, "logits_pos": pseudo.perturbed[0],
            "logits_neg": pseudo.perturbed[1]}


def compare_meta(result: StepResult, case: Case, k: int, rate: float, tolerances: Tolerances) -> None:
    wanted, pseudo = stored(case), result.pseudo
    if "meta_grad" in wanted:
        tolerances.near(pseudo.meta_grad, wanted["meta_grad"][k], tolerances.meta_grad, "meta_grad")
    if "pseudo" in wanted:
        allowed = tolerances.pseudo + rate * tolerances.pseudo_by_rate
        tolerances.near(pseudo.targets, wanted["pseudo"][k], allowed, "pseudo")
    if k == 0:
        gradient = dict(zip(case["param_order"], pseudo.gradient, strict=True))
        for key, value in parts(case, "dtheta0").items():
            tolerances.close(gradient[key], value, f"dtheta0/{key}")
        if "dtheta0_stats" in wanted:
            tolerances.statistics(rows(gradient), wanted["dtheta0_stats"], "dtheta0_stats")


def compare_state(net: torch.nn.Module, optimizer: torch.optim.Optimizer, case: Case, k: int,
                  tolerances: Tolerances) -> None:
    """Compare weights, buffers and momentum after the update, and the gradient that it was made from."""
    wanted, named = stored(case), dict(net.named_parameters())
    for key, value in parts(case, "state").items():
        tolerances.close(net.state_dict()[key], value[k], f"state/{key}")
    for key, value in parts(case, "momentum").items():
        tolerances.close(optimizer.state[named[key]]["momentum_buffer"], value[k], f"momentum/{key}")
    if "state_stats" in wanted:
        tolerances.statistics(rows(net.state_dict()), wanted["state_stats"][k], "state_stats")
    if k == 0:
        for key, value in parts(case, "grad0").items():
            tolerances.close(named[key].grad, value, f"grad0/{key}")
        if "grad0_stats" in wanted:
            gradients = {key: value.grad for key, value in named.items()}
            tolerances.statistics(rows(gradients), wanted["grad0_stats"], "grad0_stats")


@each(EXACT)
def test_exact_meta_gradient(case: Case) -> None:
    """Forward-mode differentiation, at the recorded weights of every step, is the float64 reference to 1e-6."""
    net, options = network_of(case).double(), options_of(case)
    for k in range(case["steps"]):
        if k:
            net.load_state_dict({key: torch.as_tensor(value[k - 1]) for key, value in parts(case, "state").items()})
        labeled, labels, unlabeled = batch_of(case, k)
        pseudo = pseudo_labels(net, labeled.double(), labels, unlabeled.double(), 0.1,
                               MetaGradient(options.epsilon, exact=True), World())
        np.testing.assert_allclose(pseudo.meta_grad, stored(case)["meta_grad_exact"][k], rtol=0, atol=1e-6)
