"""FreeMatch's statistics, masks and losses, the schedule, the average of weights, the optimiser and the metrics."""
from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shared.distributed import World
from shared.training.ema import EMA
from tests.golden.cases import arrays, fill, index
from tests.golden.torchssl_networks import draw_inputs, expected
from TorchSSL.core.algorithm import Batch, Setting
from TorchSSL.core.evaluation import metrics
from TorchSSL.core.trainer import Trainer, cosine
from TorchSSL.freematch import FreeMatch, consistency, parse

CASES = [case for case in index("torchssl")["cases"] if case["file"] == "algos.npz"]
FREEMATCH = [case for case in CASES if case["id"].startswith("freematch_")]
STATES = [case for case in FREEMATCH if "mask" not in case["output_keys"]]
SERIES = [case for case in FREEMATCH if "mask" in case["output_keys"]]
LOSSES = [case for case in CASES if case["id"].startswith("ce_losses")]
SCHEDULES = [case for case in CASES if case["id"].startswith("cosine_lr")]
AVERAGES = [case for case in CASES if case["id"].startswith("ema_")]
OPTIMISERS = [case for case in CASES if case["id"].startswith("sgd_")]
METRICS = [case for case in CASES if case["id"].startswith("evaluation_metrics")]
SERVES = {case["id"] for group in (FREEMATCH, LOSSES, SCHEDULES, AVERAGES, OPTIMISERS, METRICS) for case in group}


def each(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


def freematch_of(case: dict[str, Any]) -> FreeMatch:
    """Return a FreeMatch in the state that the case starts from."""
    given = case["arguments"]
    options = parse([f"--dataset={given.get('dataset', 'cifar10')}", f"--ema_p={given.get('momentum', 0.999)}",
                     f"--use_quantile={given.get('use_quantile', False)}",
                     f"--clip_thresh={given.get('clip_thresh', False)}"])
    classes = given["num_classes"]
    learner = FreeMatch(options, Setting(classes, 1000, (1 / classes,) * classes, World()))
    stored = arrays("torchssl", case["file"])
    for name, key in case.get("stored_input_keys", {}).items():
        setattr(learner, name.removesuffix("0"), torch.from_numpy(stored[key]))
    if "time_p0" in given:
        learner.time_p = torch.tensor(given["time_p0"])
    return learner


@each(STATES)
def test_first_state(case: dict[str, Any]) -> None:
    """Statistics that do not exist yet take the values of the first batch."""
    drawn, learner = draw_inputs(case), freematch_of(case)
    learner.time_p = learner.p_model = learner.label_hist = None
    learner.update((drawn["logits_w"][0] + drawn["class_bias"]).softmax(1))
    for name, value in expected(case).items():
        np.testing.assert_allclose(getattr(learner, name), value, rtol=1e-4, atol=1e-5, err_msg=name)


@each(SERIES)
def test_series(case: dict[str, Any]) -> None:
    drawn, learner, wanted = draw_inputs(case), freematch_of(case), expected(case)
    for k in range(len(wanted["time_p"])):
        weak = drawn["logits_w"][k] + drawn["class_bias"]
        strong = (drawn["logits_s"][k] + drawn["class_bias"]).requires_grad_()
        probabilities = weak.softmax(1)
        confidence, label = probabilities.max(1)
        learner.update(probabilities)
        mask = (confidence >= learner.thresholds()[label]).float()
        unsupervised = consistency(strong, label, mask)
        fairness, histogram = learner.fairness(strong, mask)
        found = {"time_p": learner.time_p, "p_model": learner.p_model, "label_hist": learner.label_hist, "mask": mask,
                 "unsup_loss": unsupervised.detach(), "ent_loss": fairness.detach(),
                 "ps_label_hist_mean": histogram.mean()}
        for name in found.keys() & wanted.keys():
            np.testing.assert_allclose(found[name], wanted[name][k], rtol=1e-4, atol=1e-5, err_msg=f"{name}, step {k}")
    gradients = {"grad_unsup_last": unsupervised, "grad_ent_last": fairness}
    for name, loss in gradients.items():
        if name in wanted:
            gradient, = torch.autograd.grad(loss, strong, retain_graph=True)
            np.testing.assert_allclose(gradient, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert wanted.keys() <= found.keys() | gradients.keys()


@each(LOSSES)
def test_cross_entropy(case: dict[str, Any]) -> None:
    drawn, wanted = draw_inputs(case), expected(case)
    logits, labels, ones = drawn["logits_w"][0], drawn["y"], torch.ones(len(drawn["y"]))
    soft = drawn["logits_s"][0].softmax(1)
    single = [consistency(logits[i:i + 1], soft[i:i + 1], ones[:1]).item() for i in range(len(logits))]
    found = {"hard_none": F.cross_entropy(logits, labels, reduction="none"), "soft_none": np.array(single),
             "hard_mean": consistency(logits, labels, ones)}
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@each(SCHEDULES)
def test_schedule(case: dict[str, Any]) -> None:
    given = case["arguments"]
    stored = arrays("torchssl", case["file"])
    steps = stored[case["stored_input_keys"]["steps"]]
    found = [given["lr"] * cosine(int(step), given["total"], given["warmup"]) for step in steps]
    np.testing.assert_allclose(found, expected(case)["lr"], rtol=1e-9)


class Toy(nn.Module):
    """The small module of the optimiser and average cases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


@each(AVERAGES)
def test_average_of_weights(case: dict[str, Any]) -> None:
    drawn, net = draw_inputs(case), fill(Toy())
    ema = EMA(net)
    deltas = {name.removeprefix("delta_"): value for name, value in drawn.items()}
    for k in range(len(next(iter(deltas.values())))):
        with torch.no_grad():
            for name, delta in deltas.items():
                net.get_parameter(name).add_(delta[k])
        ema.update(net, case["arguments"]["decay"])
    for name, value in expected(case).items():
        np.testing.assert_allclose(ema.module.get_parameter(name), value, rtol=1e-5, atol=1e-6, err_msg=name)


class Supervised:
    """The least algorithm: cross-entropy of the labelled images."""

    views, supervised_steps = (), 0

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = F.cross_entropy(net(batch.labeled), batch.labels)
        return loss, {"loss": loss}


def trainer_options(given: dict[str, Any], total: int, **extra: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(parse([])), "lr": given["lr"], "momentum": given["momentum"],
                                 "weight_decay": given["weight_decay"], "num_train_iter": total, **extra})


@each(OPTIMISERS)
def test_optimiser(case: dict[str, Any]) -> None:
    drawn, wanted, net = draw_inputs(case), expected(case), fill(Toy())
    trainer = Trainer(net, Supervised(), trainer_options(case["arguments"], case["arguments"]["total_steps"]), World())
    used, losses = [], []
    for x, y in zip(drawn["x"], drawn["y"], strict=True):
        used.append(trainer.optimizer.param_groups[0]["lr"])
        losses.append(trainer.train_step(Batch(x, y))["loss"].item())
    final = {f"final_{name}": value.detach() for name, value in net.named_parameters()}
    found = {"losses": losses, "lr": used, **final}
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@each(METRICS)
def test_metrics(case: dict[str, Any]) -> None:
    drawn = draw_inputs(case)
    logits, labels = drawn["logits"], drawn["y"]
    logits = logits + F.one_hot(labels, logits.shape[1])
    found = metrics(logits, labels, auc=True)
    for name, value in expected(case).items():
        np.testing.assert_allclose(found[name.replace("__", "/")], value, rtol=1e-5, err_msg=name)


def test_nothing_kept_has_no_fairness_loss() -> None:
    """The term is 0, not NaN, where no image passes its threshold; its gradient as well."""
    learner = FreeMatch(parse([]), Setting(4, 100, (0.25,) * 4, World()))
    strong = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, histogram = learner.fairness(strong, torch.zeros(6))
    gradient, = torch.autograd.grad(loss, strong)
    assert loss.item() == 0 and gradient.abs().max() == 0 and histogram.sum() == 0
