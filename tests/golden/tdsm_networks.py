"""The classifiers: names and shapes of the state, logits, one pass in training mode."""
from __future__ import annotations

from typing import Any

import torch

from EDM.tdsm.classifiers import (
    CAS_class,
    EDMPrecond_classifier,
    EDMPrecond_classifier_with_transition_matrix,
    class_logits,
)
from tests.golden.cases import Stored, bounds, each, fill, serves
from tests.golden.tdsm_cases import assert_state, cases_of, tensors

NETWORKS = cases_of("network")
SERVES = serves(NETWORKS)


def make(case: dict[str, Any], given: Stored) -> torch.nn.Module:
    """Return the network of a case: its arrays and words tell the ones apart that have no constructor."""
    if "constructor" in case:
        with_matrix = "T" in given
        kind = EDMPrecond_classifier_with_transition_matrix if with_matrix else EDMPrecond_classifier
        return kind(**case["constructor"])
    model_type = "resnet50" if "resnet" in case["what"].lower() else "cnn"
    return CAS_class(given["x"].shape[2], case["img_channels"], case["num_classes"], model_type)


@each(NETWORKS)
def test_classifier(case):
    given, (bound, *_) = tensors(case), bounds(case["tolerance"])
    net = fill(make(case, given)).eval()

    def assert_near(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor], key: str) -> None:
        if key in given:
            assert (class_logits(output) - given[key]).abs().max() <= bound * given[key].abs().max(), key

    x, sigma = given["x"], [given["sigma"]] if "sigma" in given else []
    with torch.no_grad():
        assert_near(net(x, *sigma), "logits")
        if "logits_aug" in given:
            assert_near(net(x, *sigma, augment_labels=given["aug"]), "logits_aug")
        if "T" in given:
            assert (net(x, *sigma)[1] - given["T"]).abs().max() <= 1e-5
        if "logits_train_mode" in given:
            assert_near(net.train()(x, *sigma), "logits_train_mode")
            stem = net.model.classifier.bn1
            assert (stem.running_mean - given["bn1_running_mean_after"]).abs().max() <= bound
            assert (stem.running_var - given["bn1_running_var_after"]).abs().max() <= bound
    assert_state(net, case["state_file"])


@each(NETWORKS)
def test_every_array_is_known(case):
    known = {"x", "sigma", "aug", "T", "logits", "logits_aug", "logits_train_mode", "bn1_running_mean_after",
             "bn1_running_var_after"}
    assert case["keys"].keys() <= known
