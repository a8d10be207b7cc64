"""Transition matrices, the weights of the clean classes, and the learned matrix."""
from __future__ import annotations

import numpy as np
import torch

from EDM.tdsm.classifiers import volmin_transition
from EDM.tdsm.loss import VolMinLoss, clean_class_weights, log_matrix, noisy_log_posterior
from EDM.tdsm.transition import clean_posterior, transition_matrix
from tests.golden.tdsm_cases import assert_close, cases_of, each, numbers, one_hot, tensors

TRANSITIONS, WEIGHTS, VOLMIN = (cases_of(f"{name}.npz") for name in ("transition", "weights", "volmin"))
CASES = {case["case"] for case in TRANSITIONS + WEIGHTS + VOLMIN}


def matrix_of(case: dict, raw: torch.Tensor | None) -> np.ndarray:
    """Return the transition matrix of a case, float64 [K, K]."""
    if case["noise_type"] == "learn":
        return volmin_transition(raw.double()).numpy()
    return transition_matrix(case["noise_type"], case["noise_rate"], case["num_classes"], case["dataset"])


def assert_matrices(matrix: np.ndarray, given: dict[str, torch.Tensor], absolute: float, relative: float) -> None:
    if "T" in given:
        assert np.abs(matrix - given["T"].numpy()).max() <= absolute
    if "S" in given:
        assert np.abs(clean_posterior(matrix) - given["S"].numpy()).max() <= absolute
    if "S_inv" in given:
        expected = given["S_inv"].double().numpy()
        assert np.abs(np.linalg.inv(clean_posterior(matrix)) - expected).max() <= relative * np.abs(expected).max()


@each(TRANSITIONS)
def test_transition(case):
    absolute, relative = numbers(case)
    assert_matrices(matrix_of(case, None), tensors(case), absolute, relative)


@each(WEIGHTS)
def test_weights(case):
    given = tensors(case)
    matrix = matrix_of(case, given.get("raw"))
    assert_matrices(matrix, given, 2e-7, 1e-4)
    log_transition = log_matrix(matrix, "cpu")
    weights = clean_class_weights(given["logits"], given["noisy_label"], log_transition, case["temp"]).double()
    exact, near = numbers(case)
    assert (weights - given["w_exact"]).abs().max() <= exact
    zeroed = given["w"].sum(1) == 0
    assert int(zeroed.sum()) == case["rows_zeroed_by_nan_rule"]
    assert (weights - given["w"]).abs()[~zeroed].max() <= max(near, 3 * case["max_abs_diff_upstream_vs_exact"])
    prior = torch.from_numpy(matrix.sum(0) / len(matrix))
    posterior = noisy_log_posterior(given["logits"], log_transition, case["temp"]).exp().double()
    assert_close(posterior / prior, given["h_over_p"], 1e-30, 1e-5)


@each(VOLMIN)
def test_volmin(case):
    given, bounds = tensors(case), numbers(case)
    raw, logits = given["raw"].requires_grad_(), given["logits"].requires_grad_()
    assert_close(volmin_transition(torch.full_like(raw, -2.0)), given["T_at_init"], *bounds)
    assert_close(volmin_transition(raw), given["T"], *bounds)

    class Levels:
        draw = None

        @staticmethod
        def sigma(level: torch.Tensor) -> torch.Tensor:
            return level

    image = torch.zeros(len(logits), 1, 1, 1)
    loss = VolMinLoss(Levels())(lambda *_, **__: (logits, volmin_transition(raw)), image,
                                one_hot(given["label"], case["num_classes"]), None, image, image)
    assert_close(loss, given["loss"], *bounds)
    loss.sum().backward()
    assert_close(logits.grad, given["grad_logits"], *bounds)
    assert_close(raw.grad, given["grad_raw"], *bounds)
