"""The MSN encoder, what it sees of a photograph, and its pre-training."""
from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from tests.golden.cases import each, facts, fill, number, serves
from tests.golden.dpt_imagenet_cases import PAPER, bound, bounds, cases_of, given, near, relative, tensors
from TorchSSL.encoders.encoder import CentralView
from TorchSSL.encoders.msn import learning_rate, loss_terms, sinkhorn, targets, weight_decay
from TorchSSL.encoders.vit import SIZES, VisionTransformer

ENCODERS, STATES = cases_of("msn_encoder"), cases_of("msn_state")
TRANSFORMS = cases_of("encoder_transform")
LOSSES, BALANCED, SCHEDULES = cases_of("msn_loss"), cases_of("sinkhorn"), cases_of("msn_schedules")
SERVES = serves(ENCODERS, STATES, TRANSFORMS, LOSSES, BALANCED, SCHEDULES)


def check_state(net: torch.nn.Module, case: dict) -> None:
    """Assert names and shapes in their order, and the number of parameters."""
    listed = facts(PAPER, case["state_file"])
    state = [[name, list(tensor.shape)] for name, tensor in net.state_dict().items()]
    assert not listed or state == listed
    assert sum(parameter.numel() for parameter in net.parameters()) == case["parameters"]


@each(ENCODERS)
@torch.no_grad()
def test_msn_encoder(case):
    stored, net = tensors(case), fill(VisionTransformer(**case["constructor"])).eval()
    check_state(net, case)
    x, small = stored["x"], stored["x_small"]
    kept = stored["perm"][:math.floor(len(stored["perm"]) * (1 - case["mask"]))]
    ours = {"feature": net.features(x), "feature2": net.features(x, 2), "normalised": net(x),
            "feature_big": net.features(stored["x_big"]), "feature_small": net.features(small),
            "feature_masked": net.features(x, kept=kept),
            "views": torch.cat([net(x, kept), net(x.flip(0), kept), net(small)]),
            "feature64": net.double().features(x.double())}
    usual, exact, resized = bounds(case["tolerance"])
    for name, value in ours.items():
        allowed = exact if name.endswith("64") else resized if name.endswith(("big", "small")) else usual
        near(value, stored[name], allowed, name)


@each(STATES)
def test_published_encoder_has_these_tensors(case):
    with torch.device("meta"):
        net = VisionTransformer(224, **SIZES[case["model_name"]]._asdict())
    check_state(net, case)


@each(TRANSFORMS)
def test_encoder_transform(case):
    h, w = case["height"], case["width"]
    yy, xx = np.mgrid[:h, :w]
    rgb = np.stack([yy * 255 / h, xx * 255 / w, 127 + 100 * np.sin(xx / 7 + yy / 11)], axis=-1)
    rgb = np.clip(rgb + np.random.default_rng(case["seed"]).integers(-20, 21, (h, w, 3)), 0, 255).astype(np.uint8)
    pixels = CentralView()(Image.fromarray(rgb)).astype(np.float64) / 255
    out = ((pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).transpose(2, 0, 1)
    stored = given(case)
    allowed = number(case["tolerance"], "equal to #")
    np.testing.assert_allclose(out[:, ::16, ::16], stored["every16"], atol=allowed, rtol=0)
    np.testing.assert_allclose([out.mean(), out.std()], stored["mean_std"], atol=bounds(case["tolerance"])[-1])


@each(LOSSES)
def test_msn_loss(case):
    stored = tensors(case)
    anchors, prototypes = stored["anchors"].requires_grad_(), stored["prototypes"].requires_grad_()
    wanted = targets(stored["targets_in"], prototypes, case["temperature"], case["sharpen"], case["sinkhorn"])
    cross_entropy, me_max, entropy = loss_terms(anchors, wanted, prototypes, case["temperature"])
    values, arrays = case["tolerance"]["values"], case["tolerance"]["arrays"]
    relative(cross_entropy, case["cross_entropy"], bound(values), "cross-entropy")
    relative(me_max, case["me_max"], bound(values), "me-max")
    if case["entropy"]:
        relative(entropy, case["entropy_value"], bound(values), "entropy")
    weight = number(case["gradient_of"], r"# \* entropy") if case["entropy"] else 0.0
    (cross_entropy + me_max + weight * entropy).backward()
    near(wanted.repeat(case["views"], 1), stored["targets"], bound(arrays), "targets")
    near(anchors.grad, stored["grad_anchors"], bound(arrays), "gradient of the anchors")
    near(prototypes.grad, stored["grad_prototypes"], bound(arrays), "gradient of the prototypes")


@each(BALANCED)
def test_sinkhorn(case):
    stored = tensors(case)
    out = sinkhorn(stored["in"], case["iterations"])
    assert float((out - stored["out"]).abs().max()) <= bound(case["tolerance"])


@each(SCHEDULES)
def test_msn_schedules(case):
    stored, total = given(case), case["ipe"] * case["epochs"]
    warmup = case["warmup"] * case["ipe"]
    rates = [learning_rate(step, total, warmup, case["start_lr"], case["lr"], case["final_lr"])
             for step in range(1, total + 1)]
    decays = [weight_decay(step, total, case["wd"], case["final_wd"]) for step in range(1, total + 1)]
    relative(np.array(rates), stored["lr"], bound(case["tolerance"]), "learning rates")
    relative(np.array(decays), stored["wd"], bound(case["tolerance"]), "weight decays")
