"""Training losses with given draws: noise levels, unreduced losses, gradients."""
from __future__ import annotations

import numpy as np
import pytest

from EDM.training.loss import LOSSES
from EDM.training.networks import PRECONDITIONERS
from tests.golden.cases import facts, fill, index
from tests.golden.edm_networks import bound, tensors

LOSS_CASES = [case for case in index("edm")["cases"] if case["kind"] == "loss"]
CASES = {case["case"] for case in LOSS_CASES}


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case["case"])
def test_loss(case):
    given, tolerance = tensors(case), case["tolerance"]
    net = fill(PRECONDITIONERS[case["network"]](**case["constructor"]).eval())
    loss_fn = LOSSES[case["loss"]](**case["loss_constructor"])
    sigma = loss_fn.sigma(given["first_draw"])
    assert ((sigma - given["sigma"]).abs() <= bound(tolerance["sigma"]) * given["sigma"]).all()

    loss = loss_fn(net, given["images"], given["labels"], given["augment_labels"], given["first_draw"], given["noise"])
    error = (loss - given["loss"]).abs().flatten(1).amax(1)
    assert (error <= bound(tolerance["loss"].split("sample")[1]) * given["loss"].flatten(1).amax(1)).all()
    assert loss.mean().item() == pytest.approx(case["mean_loss"], rel=1e-4)

    (loss.sum() / len(loss)).backward()
    norms = {name: norm for name, norm in facts("edm", case["grad_norms_file"]).items() if norm is not None}
    smallest = 1e-3 * np.median(list(norms.values()))  # below, the true gradient is zero
    for name, parameter in net.named_parameters():
        if norms.get(name, 0) >= smallest:
            assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-3), name
