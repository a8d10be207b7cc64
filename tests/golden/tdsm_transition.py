"""Transition matrices, the weights of the clean classes, and the learned matrix."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from EDM.tdsm.classifiers import INITIAL_TRANSITION, volmin_transition
from EDM.tdsm.loss import VolMinLoss, clean_class_weights, log_matrix, noisy_log_posterior
from EDM.tdsm.transition import clean_posterior, transition_matrix
from tests.golden.cases import Stored, bounds, each, serves
from tests.golden.recipes import assigned
from tests.golden.tdsm_cases import assert_close, cases_of, one_hot, tensors

TRANSITIONS, WEIGHTS, VOLMIN = cases_of("transition"), cases_of("weights"), cases_of("volmin")
SERVES = serves(TRANSITIONS, WEIGHTS, VOLMIN)


def matrix_of(case: dict[str, Any], given: Stored) -> np.ndarray:
    """Return the transition matrix of a case, float64 [K, K].

    A learned one follows from its raw parameter, stored or in the recipe of the inputs; else it is as stored, or as it
    is at first.
    """
    kind = {"none": "clean"}.get(case["noise_type"], case["noise_type"])
    if kind != "learn":
        return transition_matrix(kind, case["noise_rate"], case["num_classes"], case.get("dataset"))
    if "raw" in given:
        raw = given["raw"]
    elif "raw=" in case.get("input_recipe", ""):
        raw = assigned(case["input_recipe"])["raw"]
    elif "T" in given:
        return given["T"].double().numpy()
    else:
        raw = np.full((case["num_classes"],) * 2, INITIAL_TRANSITION)
    return volmin_transition(torch.as_tensor(raw).double()).numpy()


def assert_matrices(matrix: np.ndarray, given: Stored, absolute: float, relative: float) -> None:
    if "T" in given:
        assert np.abs(matrix - given["T"].numpy()).max() <= absolute
    if "S" in given:
        assert np.abs(clean_posterior(matrix) - given["S"].numpy()).max() <= absolute
    if "S_inv" in given:
        expected = given["S_inv"].double().numpy()
        assert np.abs(np.linalg.inv(clean_posterior(matrix)) - expected).max() <= relative * np.abs(expected).max()


@each(TRANSITIONS)
def test_transition(case):
    given = tensors(case)
    assert_matrices(matrix_of(case, given), given, *bounds(case["tolerance"]))


@each(WEIGHTS)
def test_weights(case):
    given = tensors(case)
    matrix = matrix_of(case, given)
    assert_matrices(matrix, given, 2e-7, 1e-4)
    log_transition = log_matrix(matrix, "cpu")
    weights = clean_class_weights(given["logits"], given["noisy_label"], log_transition, case["temp"]).double()
    exact, near = bounds(case["tolerance"])
    assert (weights - given["w_exact"]).abs().max() <= exact
    zeroed = given["w"].sum(1) == 0
    assert int(zeroed.sum()) == case["rows_zeroed_by_nan_rule"]
    allowed = max(near, 3 * case["max_abs_diff_upstream_vs_exact"])
    assert ((weights - given["w"]).abs()[~zeroed] <= allowed).all()
    if "h_over_p" in given:
        prior = torch.from_numpy(matrix.sum(0) / len(matrix))
        posterior = noisy_log_posterior(given["logits"], log_transition, case["temp"]).exp().double()
        assert_close(posterior / prior, given["h_over_p"], 1e-30, 1e-5)


@each(VOLMIN)
def test_volmin(case):
    given, allowed = tensors(case), bounds(case["tolerance"])
    raw, logits = given["raw"].requires_grad_(), given["logits"].requires_grad_()
    initial = torch.full_like(raw, INITIAL_TRANSITION)
    for key, start in (("T_at_init", initial), ("T", raw)):
        if key in given:
            assert_close(volmin_transition(start), given[key], *allowed)

    class Levels:
        draw = None

        @staticmethod
        def sigma(level: torch.Tensor) -> torch.Tensor:
            return level

    image = torch.zeros(len(logits), 1, 1, 1)
    loss = VolMinLoss(Levels())(lambda *_, **__: (logits, volmin_transition(raw)), image,
                                one_hot(given["label"], case["num_classes"]), None, image, image)
    loss.sum().backward()
    for key, found in (("loss", loss), ("grad_logits", logits.grad), ("grad_raw", raw.grad)):
        if key in given:
            assert_close(found, given[key], *allowed)
