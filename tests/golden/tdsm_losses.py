"""The classifier's loss and the loss of the denoiser with given draws: values, gradients, which of them are stopped."""
from __future__ import annotations

from typing import Any

import torch

from EDM.tdsm.classifiers import (
    EDMPrecond_classifier,
    EDMPrecond_classifier_with_transition_matrix,
    volmin_transition,
)
from EDM.tdsm.loss import ClassifierLoss, TDSMLoss, VolMinLoss
from EDM.training.loss import EDMLoss, VELoss, VPLoss
from EDM.training.networks import PRECONDITIONERS
from tests.golden.cases import Stored, bounds, each, facts, fill, serves
from tests.golden.tdsm_cases import PAPER, assert_close, assert_state, cases_of, one_hot, tensors
from tests.golden.tdsm_transition import matrix_of

CLASSIFIER_LOSSES, DENOISER_LOSSES = cases_of("classifier loss"), cases_of("denoiser loss")
SERVES = serves(CLASSIFIER_LOSSES, DENOISER_LOSSES)
LEVELS = {"EDMPrecond": EDMLoss, "VPPrecond": VPLoss, "VEPrecond": VELoss}


@each(CLASSIFIER_LOSSES)
def test_classifier_loss(case):
    given, allowed = tensors(case), bounds(case["tolerance"])
    logits, matrix = given["logits"].requires_grad_(), matrix_of(case, given)
    is_learned = case["noise_type"] == "learn"
    seen = {}

    def net(x, sigma, labels, augment_labels):
        seen.update(x=x, sigma=sigma)
        return (logits, torch.from_numpy(matrix).float()) if is_learned else logits

    levels = LEVELS[case.get("precond", "EDMPrecond")]()
    loss_fn = VolMinLoss(levels) if is_learned else ClassifierLoss(levels, matrix)
    labels = one_hot(given["label"], case["num_classes"])
    loss = loss_fn(net, given["images"], labels, None, given["z"], given["eps"])
    loss.sum().backward()
    for key, found in (("x_seen", seen["x"]), ("sigma_seen", seen["sigma"]), ("loss", loss),
                       ("grad_logits", logits.grad)):
        if key in given:
            assert_close(found, given[key], *allowed)


class Stub(torch.nn.Module):
    """A classifier that says the same whatever it sees."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.logits


def classifier_of(case: dict[str, Any], given: Stored, image: dict[str, int]) -> torch.nn.Module:
    """Return the classifier of a case: its stored logits, or a network, which holds the matrix where that is learned
    and either listed among its tensors or not stored by itself."""
    if case["classifier_kwargs"] is None:
        return Stub(given["cls_logits"])
    listed = facts(PAPER, f"classifier_{case['case']}_state.json").get("parameters", {})
    own_matrix = case["noise_type"] == "learn" and ("transition_matrix" in listed or not {"raw", "T"} & given.keys())
    kind = EDMPrecond_classifier_with_transition_matrix if own_matrix else EDMPrecond_classifier
    return fill(kind(**image, **case["classifier_kwargs"])).eval().requires_grad_(False)


@each(DENOISER_LOSSES)
def test_tdsm_loss(case):
    given = tensors(case)
    images = given["images"]
    image = dict(img_resolution=images.shape[2], img_channels=images.shape[1], label_dim=case["num_classes"])
    net = fill(PRECONDITIONERS[case["precond"]](**image, **case["denoiser_kwargs"])).train()
    classifier = classifier_of(case, given, image)
    raw = getattr(classifier, "transition_matrix", None)
    matrix = matrix_of(case, given) if raw is None else volmin_transition(raw.double()).numpy()
    loss_fn = TDSMLoss(LEVELS[case["precond"]](), matrix, classifier, tau=case["tau"], temp=case["temp"])

    sigma = loss_fn.sigma(given["draw"])
    if "w" in given:
        weights = loss_fn.weights(images + sigma * given["eps"], sigma, given["label"])
        assert (weights - given["w"]).abs().max() <= 1e-5

    labels = one_hot(given["label"], case["num_classes"])
    loss = loss_fn(net, images, labels, given.get("aug"), given["draw"], given["eps"])
    loss_bound, norm_bound = bounds(case["tolerance"])
    if "loss" in given:
        assert (loss - given["loss"]).abs().max() <= loss_bound * given["loss"].abs().max()
    assert abs(loss.sum().item() - case["loss_sum"]) <= loss_bound * abs(case["loss_sum"])
    assert round(float(loss_fn.statistics["candidates"]) * len(images)) == case["n_candidate_pairs"]

    loss.sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert list(gradients) == case["param_order"]
    if "grad_norms" in given:
        norms = dict(zip(case["param_order"], given["grad_norms"].tolist(), strict=True))
        smallest = 1e-3 * sorted(norms.values())[len(norms) // 2]  # below, the true gradient is zero
        for name, norm in norms.items():
            ours = 0.0 if gradients[name] is None else gradients[name].norm().item()
            assert abs(ours - norm) <= norm_bound * max(norm, smallest), name
    for key, expected in given.items():
        if key.startswith("grad:"):
            ours = gradients[key.removeprefix("grad:")]
            assert (ours - expected).abs().max() <= norm_bound * expected.abs().max(), key
    assert_state(net, case["state_file"])


@each([case for case in DENOISER_LOSSES if case.get("classifier_kwargs")])
def test_state_of_the_classifier(case):
    given = tensors(case)
    shape = given["images"].shape
    image = dict(img_resolution=shape[2], img_channels=shape[1], label_dim=case["num_classes"])
    assert_state(classifier_of(case, given, image), f"classifier_{case['case']}_state.json", listed=False)
