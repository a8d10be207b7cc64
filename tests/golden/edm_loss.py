"""Training losses with given draws: noise levels, unreduced losses, gradients."""
from __future__ import annotations

import pytest

from EDM.training.loss import LOSSES
from EDM.training.networks import PRECONDITIONERS
from tests.golden.cases import each, fill, serves
from tests.golden.edm_cases import bound, cases, compare_norms, tensors

LOSS_CASES = cases(kind="loss")
SERVES = serves(LOSS_CASES)


@each(LOSS_CASES)
def test_loss(case):
    given, relative = tensors(case), bound(case, "loss")
    net = fill(PRECONDITIONERS[case["network"]](**case["constructor"]).eval())
    loss_fn = LOSSES[case["loss"]](**case["loss_constructor"])
    sigma = loss_fn.sigma(given["first_draw"])
    assert ((sigma - given["sigma"]).abs() <= bound(case, "sigma") * given["sigma"]).all()

    loss = loss_fn(net, given["images"], given.get("labels"), given.get("augment_labels"), given["first_draw"],
                   given["noise"])
    error = (loss - given["loss"]).abs().flatten(1).amax(1)
    assert (error <= relative * given["loss"].flatten(1).amax(1)).all()
    if "mean_loss" in case:
        assert loss.mean().item() == pytest.approx(case["mean_loss"], rel=relative)

    (loss.sum() / len(loss)).backward()
    if "grad_norms_file" in case:
        compare_norms(net, case["grad_norms_file"], 1e-3)
    assert given.keys() <= {"images", "labels", "augment_labels", "first_draw", "noise", "sigma", "loss"}
