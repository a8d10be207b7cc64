"""The classifier's loss and the loss of the denoiser with given draws: values, gradients, which of them are stopped."""
from __future__ import annotations

from typing import Any

import torch

from EDM.tdsm.classifiers import EDMPrecond_classifier
from EDM.tdsm.loss import ClassifierLoss, TDSMLoss
from EDM.training.loss import EDMLoss, VELoss, VPLoss
from EDM.training.networks import PRECONDITIONERS
from tests.golden.cases import fill
from tests.golden.tdsm_cases import assert_close, assert_state, cases_of, each, numbers, one_hot, tensors
from tests.golden.tdsm_transition import matrix_of

CLASSIFIER_LOSSES, DENOISER_LOSSES = cases_of("classifier_loss.npz"), cases_of("tdsm_loss.npz")
CASES = {case["case"] for case in CLASSIFIER_LOSSES + DENOISER_LOSSES}
LEVELS = {"EDMPrecond": EDMLoss, "VPPrecond": VPLoss, "VEPrecond": VELoss}


@each(CLASSIFIER_LOSSES)
def test_classifier_loss(case):
    given, bounds = tensors(case), numbers(case)
    logits = given["logits"].requires_grad_()
    seen = {}

    def net(x, sigma, labels, augment_labels):
        seen.update(x=x, sigma=sigma)
        return logits

    loss_fn = ClassifierLoss(EDMLoss(), matrix_of(case, None))
    labels = one_hot(given["label"], case["num_classes"])
    loss = loss_fn(net, given["images"], labels, None, given["z"], given["eps"])
    assert_close(seen["x"], given["x_seen"], *bounds)
    assert_close(seen["sigma"], given["sigma_seen"], *bounds)
    assert_close(loss, given["loss"], *bounds)
    loss.sum().backward()
    assert_close(logits.grad, given["grad_logits"], *bounds)


class Stub(torch.nn.Module):
    """A classifier that says the same whatever it sees."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.logits


def classifier_of(case: dict[str, Any], given: dict[str, torch.Tensor], image: dict[str, int]) -> torch.nn.Module:
    if case["classifier_kwargs"] is None:
        return Stub(given["cls_logits"])
    return fill(EDMPrecond_classifier(**image, **case["classifier_kwargs"])).eval().requires_grad_(False)


@each(DENOISER_LOSSES)
def test_tdsm_loss(case):
    given = tensors(case)
    images = given["images"]
    image = dict(img_resolution=images.shape[2], img_channels=images.shape[1], label_dim=case["num_classes"])
    net = fill(PRECONDITIONERS[case["precond"]](**image, **case["denoiser_kwargs"])).train()
    assert_state(net, case["state_file"])
    loss_fn = TDSMLoss(LEVELS[case["precond"]](), matrix_of(case, given.get("raw")), classifier_of(case, given, image),
                       tau=case["tau"], temp=case["temp"])

    sigma = loss_fn.sigma(given["draw"])
    weights = loss_fn.weights(images + sigma * given["eps"], sigma, given["label"])
    assert (weights - given["w"]).abs().max() <= 1e-5

    loss = loss_fn(net, images, one_hot(given["label"], case["num_classes"]), given["aug"], given["draw"], given["eps"])
    loss_bound, norm_bound = numbers(case)
    assert (loss - given["loss"]).abs().max() <= loss_bound * given["loss"].abs().max()
    assert abs(loss.sum().item() - case["loss_sum"]) <= loss_bound * abs(case["loss_sum"])
    assert round(float(loss_fn.statistics["candidates"]) * len(images)) == case["n_candidate_pairs"]

    loss.sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert list(gradients) == case["param_order"]
    norms = dict(zip(case["param_order"], given["grad_norms"].tolist(), strict=True))
    smallest = 1e-3 * sorted(norms.values())[len(norms) // 2]  # below, the true gradient is zero
    for name, norm in norms.items():
        ours = 0.0 if gradients[name] is None else gradients[name].norm().item()
        assert abs(ours - norm) <= norm_bound * max(norm, smallest), name
    for key, expected in given.items():
        if key.startswith("grad:"):
            ours = gradients[key.removeprefix("grad:")]
            assert (ours - expected).abs().max() <= 1e-3 * expected.abs().max(), key


def test_state_of_the_classifiers():
    for case in DENOISER_LOSSES:
        if case["classifier_kwargs"] is not None:
            shape = tensors(case)["images"].shape
            net = EDMPrecond_classifier(shape[2], shape[1], case["num_classes"], **case["classifier_kwargs"])
            assert_state(net, f"classifier_{case['case']}_state.json", listed=False)
