"""The losses of FixMatch and its kin, SoftMatch's weights, MixUp and its interleaving, and VAT, piece by piece."""
from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.augment.mixing import group_offsets, interleaved, mixup
from shared.distributed import World
from tests.golden.cases import each, number, serves, tolerance, whole
from tests.golden.torchssl_cases import (
    cases_of,
    draw_inputs,
    expected,
    flags_of,
    method_of,
    network_of,
    norms,
    stored_input,
)
from TorchSSL import flexmatch, softmatch, uda, vat
from TorchSSL.core.algorithm import Batch, Setting, squared_difference

MASKED, ALIGNED, SOFT = cases_of("masked loss"), cases_of("alignment"), cases_of("softmatch series")
ANNEALING, ANNEALED = cases_of("annealing"), cases_of("annealed cross entropy")
DIFFERENCES, INTERLEAVED, MIXED = cases_of("difference"), cases_of("interleaving"), cases_of("mixup")
ADVERSARIAL = cases_of("adversarial loss")
SERVES = serves(MASKED, ALIGNED, SOFT, ANNEALING, ANNEALED, DIFFERENCES, INTERLEAVED, MIXED, ADVERSARIAL)


def compare(found: dict[str, Any], wanted: dict[str, Any], case: dict[str, Any], step: int | None = None) -> None:
    """Compare all that is wanted, of one step where each array has a row a step."""
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value if step is None else value[step],
                                   err_msg=f"{name}, step {step}", **tolerance(case["tolerance"]))


def learner_of(case: dict[str, Any], script: Any, name: str, classes: int) -> Any:
    given = case.get("stored_input_keys", {})
    shares = stored_input(case, "p_target").tolist() if "p_target" in given else [1 / classes] * classes
    options = script.parse(flags_of(case["arguments"], script))
    learner = getattr(script, name)(options, Setting(classes, 1000, tuple(shares), World()))
    if "class_acc" in given and hasattr(learner, "status"):
        learner.status.beta = stored_input(case, "class_acc")
    return learner


def loss_of(learner: Any, weak: torch.Tensor, strong: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, dict]:
    """Return the loss where the views are logits already and the network hands them on."""
    count = len(weak)
    views = (weak, strong)[:len(learner.views)]
    batch = Batch(torch.zeros(2, weak.shape[1]), torch.zeros(2, dtype=torch.int64), views, torch.arange(count),
                  torch.full((count,), -1))
    return learner.loss(nn.Identity(), batch, step)


@each(MASKED)
def test_masked_loss(case: dict[str, Any]) -> None:
    """Cases use one batch of the drawn logits, which the note names."""
    drawn, place = draw_inputs(case), whole(case.get("note", ""), "index #", 0)
    weak, strong = drawn["logits_w"][place].clone(), drawn["logits_s"][place].clone().requires_grad_()
    script, kind = method_of(case)
    learner = learner_of(case, importlib.import_module(f"TorchSSL.{script}"), kind, weak.shape[1])
    if len(learner.views) == 1:
        strong = weak.requires_grad_()
    total, values = loss_of(learner, weak, strong, step=learner.options.num_train_iter)
    assert learner.options.ulb_loss_ratio == 1  # so that the gradient is that of the loss
    gradient, = torch.autograd.grad(total, strong)
    confidence, label = weak.detach().softmax(1).max(1)
    found = {"loss": values["train/unsup_loss"].detach(), "mask_mean": 1 - values["train/mask_ratio"],
             "grad": gradient, "select": (confidence >= learner.options.p_cutoff).long(), "pseudo_label": label}
    compare(found, expected(case), case)


@each(ALIGNED)
def test_distribution_alignment(case: dict[str, Any]) -> None:
    drawn, wanted = draw_inputs(case), expected(case)
    learner = learner_of(case, flexmatch, "FlexMatch", drawn["logits_w"].shape[2])
    selected, label = wanted.pop("select", None), wanted.pop("pseudo_label", None)
    for k in range(len(drawn["logits_w"])):
        learner.status.label.fill_(-1)  # the status stays as given
        _, values = loss_of(learner, drawn["logits_w"][k], drawn["logits_s"][k])
        noted = learner.status.label[:drawn["logits_w"].shape[1]]
        if selected is not None:
            np.testing.assert_array_equal(noted >= 0, selected[k] == 1)
        if label is not None:
            np.testing.assert_array_equal(noted[noted >= 0], label[k][noted >= 0])
        found = {"loss": values["train/unsup_loss"], "mask_mean": 1 - values["train/mask_ratio"],
                 "p_model": learner.alignment.p_model}
        compare(found, wanted, case, k)


@each(ANNEALING)
def test_signal_annealing(case: dict[str, Any]) -> None:
    given, steps = case["arguments"], stored_input(case, "iterations")
    for schedule, wanted in expected(case).items():
        found = [uda.annealed(schedule, int(step) / given["total_iter"], given["num_classes"]) for step in steps]
        np.testing.assert_allclose(found, wanted, **tolerance(case["tolerance"]), err_msg=schedule)


@each(ANNEALED)
def test_annealed_cross_entropy(case: dict[str, Any]) -> None:
    drawn, place = draw_inputs(case), whole(case.get("note", ""), "index #", 0)
    loss, mask = uda.annealed_cross_entropy(drawn["logits_w"][place], drawn["y"], case["arguments"]["tsa"])
    compare({"loss": loss, "mask": mask}, expected(case), case)


@each(SOFT)
def test_softmatch_series(case: dict[str, Any]) -> None:
    given, drawn, wanted = case["arguments"], draw_inputs(case), expected(case)
    learner = learner_of(case, softmatch, "SoftMatch", given["num_classes"])
    learner.options.ema_p = given["momentum"]
    learner.lb_prob_t, learner.ulb_prob_t = stored_input(case, "lb_prob_t0"), stored_input(case, "ulb_prob_t0")
    learner.prob_max_mu_t, learner.prob_max_var_t = torch.tensor(given["mu0"]), torch.tensor(given["var0"])
    for k in range(len(drawn["logits_w"])):
        labeled, weak, strong = (drawn[name][k] for name in ("logits_lb", "logits_w", "logits_s"))
        batch = Batch(labeled, torch.zeros(len(labeled), dtype=torch.int64), (weak, strong), torch.arange(len(weak)),
                      torch.full((len(weak),), -1))
        _, values = learner.loss(nn.Identity(), batch, k)
        confidence = learner.aligned(weak.softmax(1)).max(1).values
        found = {"lb_prob_t": learner.lb_prob_t, "ulb_prob_t": learner.ulb_prob_t, "mu": learner.prob_max_mu_t,
                 "var": learner.prob_max_var_t, "max_probs": confidence, "weight": learner.weight(confidence),
                 "unsup_loss": values["train/unsup_loss"]}
        compare(found, wanted, case, k)


@each(DIFFERENCES)
def test_squared_difference(case: dict[str, Any]) -> None:
    drawn = draw_inputs(case)
    logits = drawn["a"].requires_grad_()
    loss = squared_difference(logits, drawn["b"].softmax(1))
    compare({"loss": loss.detach(), "grad": torch.autograd.grad(loss, logits)[0]}, expected(case), case)


@each(INTERLEAVED)
def test_interleaving(case: dict[str, Any]) -> None:
    step = whole(case["what"], r"#\*k", 1000)
    for name, wanted in expected(case).items():
        what, size, unlabelled = re.fullmatch(r"(interleave|offsets)_batch(\d+)_nu(\d+)", name).groups()
        size, chunks = int(size), int(unlabelled) + 1
        if what == "offsets":
            assert group_offsets(size, chunks) == wanted.tolist()
        else:
            order = interleaved(chunks, size)
            np.testing.assert_array_equal(order // size * step + order % size, wanted)
            np.testing.assert_array_equal(order.flatten()[order.flatten()], np.arange(chunks * size))


@each(MIXED)
def test_mixup(case: dict[str, Any]) -> None:
    drawn = draw_inputs(case)
    inputs, targets, kept = mixup(drawn["x"], drawn["b"].softmax(1), float(stored_input(case, "raw_beta_draw")),
                                  stored_input(case, "permutation"))
    compare({"lam": kept, "mixed_x": inputs, "mixed_y": targets}, expected(case), case)


class Linear(nn.Module):
    """logits = flatten(x) W^T + bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.flatten(1), self.weight, self.bias)


@each(ADVERSARIAL)
def test_adversarial_loss(case: dict[str, Any]) -> None:
    given, wanted = case["arguments"], expected(case)
    drawn = {name: value.double() for name, value in draw_inputs(case).items()}
    described = given["classifier"]
    net = Linear(drawn["W"], drawn["bias"]) if described.startswith("logits") else network_of(described).double()
    logits = net(drawn["x"])
    loss = vat.adversarial_loss(net, drawn["x"], logits, drawn["noise"], given["xi"], given["eps"],
                                given["power_iterations"])
    gradients = norms(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    relative = number(case["tolerance"], "rtol #")
    for name, found, small in (("vat_loss", loss.detach(), 0), ("entropy", vat.entropy(logits).detach(), 0),
                               ("grad_l2", gradients, 1e-9)):
        if name in wanted:
            np.testing.assert_allclose(found, wanted[name], rtol=relative, atol=small, err_msg=name)


def test_every_script_is_importable_by_its_published_name() -> None:
    for name in ("uda_flex", "pseudolabel_flex", "freematch_entropy"):
        assert importlib.import_module(f"TorchSSL.{name}").parse([]).alg == name
