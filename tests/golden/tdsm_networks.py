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
from tests.golden.cases import facts, fill
from tests.golden.tdsm_cases import assert_state, cases_of, each, numbers, tensors

NETWORK_CASES = cases_of("classifier_nets.npz")
CASES = {case["case"] for case in NETWORK_CASES}


def make(case: dict[str, Any], resolution: int) -> torch.nn.Module:
    """Return the network of a case: its state file tells the ones apart that have no constructor."""
    names = facts("tdsm", case["state_file"])["parameters"]
    if "constructor" in case:
        with_matrix = "transition_matrix" in names
        kind = EDMPrecond_classifier_with_transition_matrix if with_matrix else EDMPrecond_classifier
        return kind(**case["constructor"])
    model_type = "resnet50" if any(name.startswith("model.classifier.layer") for name in names) else "cnn"
    return CAS_class(resolution, case["img_channels"], case["num_classes"], model_type)


@each(NETWORK_CASES)
def test_classifier(case):
    given, (bound,) = tensors(case), numbers(case)
    net = fill(make(case, given["x"].shape[2])).eval()
    assert_state(net, case["state_file"])

    def near(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor], key: str) -> bool:
        return (class_logits(output) - given[key]).abs().max() <= bound * given[key].abs().max()

    x, sigma = given["x"], [given["sigma"]] if "sigma" in given else []
    with torch.no_grad():
        assert near(net(x, *sigma), "logits")
        if "logits_aug" in given:
            assert near(net(x, *sigma, augment_labels=given["aug"]), "logits_aug")
        if "T" in given:
            assert (net(x, *sigma)[1] - given["T"]).abs().max() <= 1e-5
        if "logits_train_mode" in given:
            assert near(net.train()(x, *sigma), "logits_train_mode")
            stem = net.model.classifier.bn1
            assert (stem.running_mean - given["bn1_running_mean_after"]).abs().max() <= bound
            assert (stem.running_var - given["bn1_running_var_after"]).abs().max() <= bound
