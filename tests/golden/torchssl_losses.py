"""The losses of FixMatch and its kin, SoftMatch's weights, MixUp and its interleaving, and VAT, piece by piece."""
from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shared.augment.mixing import group_offsets, interleaved, mixup
from shared.distributed import World
from tests.golden.cases import arrays, fill, index
from tests.golden.torchssl_networks import draw_inputs, expected
from TorchSSL import fixmatch, flexmatch, pseudolabel, softmatch, uda, vat
from TorchSSL.core.algorithm import Batch, Setting, squared_difference
from TorchSSL.core.networks import WideResNet

CASES = [case for case in index("torchssl")["cases"] if case["file"] == "algos.npz"]
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def starting(*prefixes: str) -> list[dict[str, Any]]:
    return [case for case in CASES if case["id"].startswith(prefixes)]


# Cases with one batch of logits, and which of the drawn batches it is.
MASKED = {case["id"]: (case, script, learner, number)
          for prefix, script, learner, number in (("fixmatch_p", fixmatch, "FixMatch", 0),
                                                  ("flexmatch_p", flexmatch, "FlexMatch", 0),
                                                  ("uda_flex", uda, "UDA", 1),
                                                  ("pseudolabel_flex", pseudolabel, "PseudoLabel", 2))
          for case in starting(prefix)}
ALIGNED, ANNEALING, ANNEALED = starting("flexmatch_DA"), starting("uda_tsa"), starting("uda_supervised_masked")
SOFT, DIFFERENCES = starting("softmatch_series"), starting("mixmatch_mse", "meanteacher_pimodel_mse")
INTERLEAVED, MIXED, ADVERSARIAL = starting("mixmatch_interleave"), starting("mixup"), starting("vat_")
SERVES = {*MASKED} | {case["id"] for group in (ALIGNED, ANNEALING, ANNEALED, SOFT, DIFFERENCES, INTERLEAVED, MIXED,
                                              ADVERSARIAL) for case in group}


def each(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


def stored(case: dict[str, Any], name: str) -> torch.Tensor:
    return torch.from_numpy(arrays("torchssl", case["file"])[case["stored_input_keys"][name]])


def learner_of(case: dict[str, Any], script: Any, name: str, classes: int) -> Any:
    known = vars(script.parse([]))
    flags = [f"--{key}={value}" for key, value in case["arguments"].items() if key in known]
    given = case.get("stored_input_keys", {})
    shares = stored(case, "p_target").tolist() if "p_target" in given else [1 / classes] * classes
    learner = getattr(script, name)(script.parse(flags), Setting(classes, 1000, tuple(shares), World()))
    if "class_acc" in given and hasattr(learner, "status"):
        learner.status.beta = stored(case, "class_acc")
    return learner


def loss_of(learner: Any, weak: torch.Tensor, strong: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, dict]:
    """Return the loss where the views are logits already and the network hands them on."""
    count = len(weak)
    views = (weak, strong)[:len(learner.views)]
    batch = Batch(torch.zeros(2, weak.shape[1]), torch.zeros(2, dtype=torch.int64), views, torch.arange(count),
                  torch.full((count,), -1))
    return learner.loss(nn.Identity(), batch, step)


@pytest.mark.parametrize("name", MASKED)
def test_masked_loss(name: str) -> None:
    case, script, kind, number = MASKED[name]
    drawn, wanted = draw_inputs(case), expected(case)
    weak, strong = drawn["logits_w"][number].clone(), drawn["logits_s"][number].clone().requires_grad_()
    learner = learner_of(case, script, kind, weak.shape[1])
    if len(learner.views) == 1:
        strong = weak.requires_grad_()
    total, values = loss_of(learner, weak, strong, step=learner.options.num_train_iter)
    gradient, = torch.autograd.grad(total, strong)
    confidence, label = weak.detach().softmax(1).max(1)
    found = {"loss": values["train/unsup_loss"].detach(), "mask_mean": 1 - values["train/mask_ratio"],
             "grad": gradient, "select": (confidence >= learner.options.p_cutoff).long(), "pseudo_label": label}
    assert wanted.keys() <= found.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, err_msg=key, **TOLERANCE)


def test_published_defaults_of_the_weights() -> None:
    """The loss on unlabelled images has the weight 1 in the cases above."""
    for _, script, _, _ in MASKED.values():
        assert script.parse([]).ulb_loss_ratio == 1


@each(ALIGNED)
def test_distribution_alignment(case: dict[str, Any]) -> None:
    drawn, wanted = draw_inputs(case), expected(case)
    learner = learner_of(case, flexmatch, "FlexMatch", 10)
    for k in range(len(wanted["loss"])):
        learner.status.label.fill_(-1)  # the status stays as given
        _, values = loss_of(learner, drawn["logits_w"][k], drawn["logits_s"][k])
        noted = learner.status.label[:wanted["select"].shape[1]]
        selected = wanted["select"][k] == 1
        np.testing.assert_array_equal(noted >= 0, selected)
        np.testing.assert_array_equal(noted[selected], wanted["pseudo_label"][k][selected])
        found = {"loss": values["train/unsup_loss"], "mask_mean": 1 - values["train/mask_ratio"],
                 "p_model": learner.alignment.p_model}
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name][k], err_msg=f"{name}, step {k}", **TOLERANCE)


@each(ANNEALING)
def test_signal_annealing(case: dict[str, Any]) -> None:
    given, steps = case["arguments"], stored(case, "iterations")
    for schedule, wanted in expected(case).items():
        found = [uda.annealed(schedule, int(step) / given["total_iter"], given["num_classes"]) for step in steps]
        np.testing.assert_allclose(found, wanted, rtol=1e-9, err_msg=schedule)


@each(ANNEALED)
def test_annealed_cross_entropy(case: dict[str, Any]) -> None:
    drawn, wanted = draw_inputs(case), expected(case)
    loss, mask = uda.annealed_cross_entropy(drawn["logits_w"][0], drawn["y"], case["arguments"]["tsa"])
    np.testing.assert_allclose(loss, wanted["loss"], **TOLERANCE)
    np.testing.assert_array_equal(mask, wanted["mask"])


@each(SOFT)
def test_softmatch_series(case: dict[str, Any]) -> None:
    given, drawn, wanted = case["arguments"], draw_inputs(case), expected(case)
    learner = learner_of(case, softmatch, "SoftMatch", given["num_classes"])
    learner.options.ema_p = given["momentum"]
    learner.lb_prob_t, learner.ulb_prob_t = stored(case, "lb_prob_t0"), stored(case, "ulb_prob_t0")
    learner.prob_max_mu_t, learner.prob_max_var_t = torch.tensor(given["mu0"]), torch.tensor(given["var0"])
    for k in range(len(wanted["mu"])):
        labeled, weak, strong = (drawn[name][k] for name in ("logits_lb", "logits_w", "logits_s"))
        batch = Batch(labeled, torch.zeros(len(labeled), dtype=torch.int64), (weak, strong), torch.arange(len(weak)),
                      torch.full((len(weak),), -1))
        _, values = learner.loss(nn.Identity(), batch, k)
        confidence = learner.aligned(weak.softmax(1)).max(1).values
        found = {"lb_prob_t": learner.lb_prob_t, "ulb_prob_t": learner.ulb_prob_t, "mu": learner.prob_max_mu_t,
                 "var": learner.prob_max_var_t, "max_probs": confidence, "weight": learner.weight(confidence),
                 "unsup_loss": values["train/unsup_loss"]}
        assert wanted.keys() <= found.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value[k], err_msg=f"{name}, step {k}", **TOLERANCE)


@each(DIFFERENCES)
def test_squared_difference(case: dict[str, Any]) -> None:
    drawn, wanted = draw_inputs(case), expected(case)
    logits = drawn["a"].requires_grad_()
    loss = squared_difference(logits, drawn["b"].softmax(1))
    np.testing.assert_allclose(loss.detach(), wanted["loss"], **TOLERANCE)
    np.testing.assert_allclose(torch.autograd.grad(loss, logits)[0], wanted["grad"], rtol=1e-4, atol=1e-7)


@each(INTERLEAVED)
def test_interleaving(case: dict[str, Any]) -> None:
    for name, wanted in expected(case).items():
        what, batch, unlabelled = name.split("_")
        size, chunks = int(batch.removeprefix("batch")), int(unlabelled.removeprefix("nu")) + 1
        if what == "offsets":
            assert group_offsets(size, chunks) == wanted.tolist()
        else:
            order = interleaved(chunks, size)
            np.testing.assert_array_equal(order // size * 1000 + order % size, wanted)
            np.testing.assert_array_equal(order.flatten()[order.flatten()], np.arange(chunks * size))


@each(MIXED)
def test_mixup(case: dict[str, Any]) -> None:
    drawn, wanted = draw_inputs(case), expected(case)
    inputs, targets, kept = mixup(drawn["x"], drawn["b"].softmax(1), float(stored_scalar(case)),
                                  stored(case, "permutation"))
    for name, value in (("lam", kept), ("mixed_x", inputs), ("mixed_y", targets)):
        np.testing.assert_allclose(value, wanted[name], err_msg=name, **TOLERANCE)


def stored_scalar(case: dict[str, Any]) -> float:
    return float(arrays("torchssl", case["file"])[case["stored_input_keys"]["raw_beta_draw"]])


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
    if given["classifier"].startswith("logits"):
        net: nn.Module = Linear(drawn["W"], drawn["bias"])
    else:
        words = given["classifier"].replace(",", " ").split()
        net = fill(WideResNet(int(words[words.index("classes") - 1]), depth=int(words[words.index("depth") + 1]),
                              widen_factor=int(words[words.index("widen") + 1]))).double()
        with torch.no_grad():
            net.fc.weight.mul_(float(words[words.index("x") + 1]))
    logits = net(drawn["x"])
    loss = vat.adversarial_loss(net, drawn["x"], logits, drawn["noise"], given["xi"], given["eps"],
                                given["power_iterations"])
    np.testing.assert_allclose(loss.detach(), wanted["vat_loss"], rtol=1e-4)
    np.testing.assert_allclose(vat.entropy(logits).detach(), wanted["entropy"], rtol=1e-4)
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    found = [-1.0 if gradient is None else gradient.norm().item() for gradient in gradients]
    np.testing.assert_allclose(found, wanted["grad_l2"], rtol=1e-4, atol=1e-9)


def test_every_script_is_importable_by_its_published_name() -> None:
    for name in ("uda_flex", "pseudolabel_flex", "freematch_entropy"):
        assert importlib.import_module(f"TorchSSL.{name}").parse([]).alg == name
