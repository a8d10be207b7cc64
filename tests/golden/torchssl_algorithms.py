"""FreeMatch's statistics, masks and losses, the schedule, the average of weights, the optimiser and the metrics."""
from __future__ import annotations

import argparse
import re
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shared.distributed import World
from shared.training.ema import EMA
from tests.golden.cases import each, fill, number, serves, tolerance
from tests.golden.torchssl_cases import ALL, cases_of, draw_inputs, expected, stored_input
from TorchSSL.core.algorithm import Batch, Setting
from TorchSSL.core.evaluation import metrics
from TorchSSL.core.trainer import Trainer, cosine
from TorchSSL.freematch import FreeMatch, consistency, parse

STATES, SERIES = cases_of("freematch state"), cases_of("freematch series")
LOSSES, SCHEDULES, AVERAGES = cases_of("cross entropy"), cases_of("schedule"), cases_of("average")
OPTIMISERS, METRICS = cases_of("optimiser"), cases_of("metrics")
SERVES = serves(STATES, SERIES, LOSSES, SCHEDULES, AVERAGES, OPTIMISERS, METRICS)


def freematch_of(case: dict[str, Any]) -> FreeMatch:
    """Return a FreeMatch in the state that the case starts from."""
    given = case["arguments"]
    options = parse([f"--dataset={given.get('dataset', 'cifar10')}", f"--ema_p={given.get('momentum', 0.999)}",
                     f"--use_quantile={given.get('use_quantile', False)}",
                     f"--clip_thresh={given.get('clip_thresh', False)}"])
    classes = given["num_classes"]
    learner = FreeMatch(options, Setting(classes, 1000, (1 / classes,) * classes, World()))
    for name in case.get("stored_input_keys", {}):
        setattr(learner, name.removesuffix("0"), stored_input(case, name))
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
        np.testing.assert_allclose(getattr(learner, name), value, **tolerance(case["tolerance"]), err_msg=name)


@each(SERIES)
def test_series(case: dict[str, Any]) -> None:
    drawn, learner, wanted = draw_inputs(case), freematch_of(case), expected(case)
    allowed = tolerance(case["tolerance"])
    for k in range(len(drawn["logits_w"])):
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
            np.testing.assert_allclose(found[name], wanted[name][k], err_msg=f"{name}, step {k}", **allowed)
    gradients = {"grad_unsup_last": unsupervised, "grad_ent_last": fairness}
    for name, loss in gradients.items():
        if name in wanted:
            gradient, = torch.autograd.grad(loss, strong, retain_graph=True)
            np.testing.assert_allclose(gradient, wanted[name], err_msg=name, **allowed)
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
        np.testing.assert_allclose(found[name], value, **tolerance(case["tolerance"]), err_msg=name)


@each(SCHEDULES)
def test_schedule(case: dict[str, Any]) -> None:
    given = case["arguments"]
    found = [given["lr"] * cosine(int(step), given["total"], given["warmup"]) for step in stored_input(case, "steps")]
    np.testing.assert_allclose(found, expected(case)["lr"], **tolerance(case["tolerance"]))


TOY = "conv1: Conv2d(2,3,3); bn1: BatchNorm2d(3); fc: Linear(3,4); frozen: 2-vector without gradient"


class Toy(nn.Module):
    """The small module of the optimiser and average cases, as described in words: a convolution, its batch norm, a
    linear layer on what they leave, and a parameter without gradient."""

    def __init__(self, text: str) -> None:
        super().__init__()
        for name, kind, sizes in re.findall(r"(\w+): (Conv2d|BatchNorm2d|Linear)\(([\d, ]+)\)", text):
            self.add_module(name, getattr(nn, kind)(*map(int, sizes.split(","))))
        for name, size in re.findall(r"(\w+): (\d+)-vector without gradient", text):
            self.register_parameter(name, nn.Parameter(torch.zeros(int(size)), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convolution, norm, linear = self.children()
        return linear(torch.relu(norm(convolution(x))).mean((2, 3)))


def toy_of(case: dict[str, Any]) -> Toy:
    """Return the filled module of a case; only one case may describe it for all."""
    described = [other["arguments"]["module"] for other in (case, *ALL) if "module" in other.get("arguments", {})]
    return fill(Toy((described or [TOY])[0]))


@each(AVERAGES)
def test_average_of_weights(case: dict[str, Any]) -> None:
    drawn, net = draw_inputs(case), toy_of(case)
    ema = EMA(net)
    deltas = {name.removeprefix("delta_"): value for name, value in drawn.items()}
    for k in range(len(next(iter(deltas.values())))):
        with torch.no_grad():
            for name, delta in deltas.items():
                net.get_parameter(name).add_(delta[k])
        ema.update(net, case["arguments"]["decay"])
    for name, value in expected(case).items():
        np.testing.assert_allclose(ema.module.get_parameter(name), value, **tolerance(case["tolerance"]), err_msg=name)


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
    drawn, wanted, net = draw_inputs(case), expected(case), toy_of(case)
    trainer = Trainer(net, Supervised(), trainer_options(case["arguments"], case["arguments"]["total_steps"]), World())
    used, losses = [], []
    for x, y in zip(drawn["x"], drawn["y"], strict=True):
        used.append(trainer.optimizer.param_groups[0]["lr"])
        losses.append(trainer.train_step(Batch(x, y))["loss"].item())
    final = {f"final_{name}": value.detach() for name, value in net.named_parameters()}
    found = {"losses": losses, "lr": used, **final}
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, **tolerance(case["tolerance"]), err_msg=name)


@each(METRICS)
def test_metrics(case: dict[str, Any]) -> None:
    drawn = draw_inputs(case)
    logits, labels = drawn["logits"], drawn["y"]
    logits = logits + number(case.get("note", ""), "# is added", 0) * F.one_hot(labels, logits.shape[1])
    found = metrics(logits, labels, auc=True)
    for name, value in expected(case).items():
        np.testing.assert_allclose(found[name.replace("__", "/")], value, **tolerance(case["tolerance"]), err_msg=name)


def test_nothing_kept_has_no_fairness_loss() -> None:
    """The term is 0, not NaN, where no image passes its threshold; its gradient as well."""
    learner = FreeMatch(parse([]), Setting(4, 100, (0.25,) * 4, World()))
    strong = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, histogram = learner.fairness(strong, torch.zeros(6))
    gradient, = torch.autograd.grad(loss, strong)
    assert loss.item() == 0 and gradient.abs().max() == 0 and histogram.sum() == 0
