"""U-ViT: outputs, gradients, names and shapes of all options and of the published sizes, initial values."""
from __future__ import annotations

import re

import numpy as np
import torch

from EDM.latent.layers import sinusoid, unpatchify
from EDM.latent.uvit import UViT
from tests.golden.cases import each, facts, serves
from tests.golden.dpt_imagenet_cases import (
    PAPER,
    bound,
    bounds,
    cases_of,
    check_gradients,
    check_state,
    filled,
    near,
    tensors,
)

NETS, SIZES, INITIAL = cases_of("uvit"), cases_of("uvit_state"), cases_of("uvit_init")
TIMES, PATCHES = cases_of("time_embedding"), cases_of("unpatchify")
SERVES = serves(NETS, SIZES, INITIAL, TIMES, PATCHES)


@each(NETS)
def test_uvit(case):
    net, stored, tolerance = filled(UViT(**case["constructor"])), tensors(case), case["tolerance"]
    check_state(net, case)
    for suffix, dtype in (("", torch.float32), ("64", torch.float64)):
        x = stored["x"].to(dtype).detach().requires_grad_()
        out = net.to(dtype)(x, stored["t"], stored.get("y"))
        net.zero_grad()
        out.square().sum().mul(0.5).backward()
        near(out, stored["out" + suffix], bound(tolerance["out" + suffix]), "out" + suffix)
        near(x.grad, stored["grad_x" + suffix], bound(tolerance["grad_x"]), "grad_x" + suffix)
    check_gradients(net, case, bounds(tolerance["param_grad_norms"])[1])
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name in case["params_without_grad"]), name


@each(SIZES)
def test_published_size(case):
    with torch.device("meta"):
        check_state(UViT(**case["constructor"]), case)


@each(INITIAL)
def test_initial_values(case):
    torch.manual_seed(1)
    state = UViT(**case["constructor"]).state_dict()
    for name, reference in facts(PAPER, case["file"]).items():
        values, std = state[name].double(), reference["std"]
        assert values.numel() == reference["size"]
        if std == 0 or values.numel() == 1:
            assert std != 0 or bool((values == reference["mean"]).all()), name
            continue
        # Both are draws, so the difference of the deviations has twice the variance; likewise the means.
        assert abs(values.std(unbiased=False).item() / std - 1) < 5 / np.sqrt(values.numel()), name
        assert abs(values.mean().item() - reference["mean"]) < 5 * std * np.sqrt(2 / values.numel()), name


@each(TIMES)
def test_time_embedding(case):
    stored, (small, large) = tensors(case), bounds(case["tolerance"])
    t, late = stored["t"], stored["t"] >= float(re.search(r"t >= ([\d.]+)", case["tolerance"])[1])
    for size in case["dims"]:
        error = (sinusoid(t, size) - stored[f"out{size}"]).abs()
        assert error[~late].max() <= small and error[late].max() <= large, size


@each(PATCHES)
def test_unpatchify(case):
    stored = tensors(case)
    assert torch.equal(unpatchify(stored["tokens"], case["channels"]), stored["image"])
