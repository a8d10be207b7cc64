"""Fréchet distances of given features, as the published code computes and prints them."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from EDM.metrics.metrics import Moments, frechet_distance, frechet_distance_of_features
from tests.golden.cases import arrays, each, number, serves
from tests.golden.edm_cases import PAPER, cases, json_facts

FID = cases(kind="fid")
SERVES = serves(FID)


def stored(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays whose key begins with the case's name; the index does not list them."""
    prefix = f"{case['case']}/"
    return {key.removeprefix(prefix): array for key, array in arrays(PAPER, case["file"]).items()
            if key.startswith(prefix)}


def features_of(case: dict[str, Any]) -> list[torch.Tensor]:
    found = stored(case)
    if not found:
        pytest.skip("there are no features")
    return [torch.from_numpy(found[f"features{which}"]) for which in (1, 2)]


def moments_of(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance, in batches of which the last is smaller."""
    moments = Moments(features.shape[1])
    for batch in features.split(7):
        moments.add(batch)
    return moments.mean_and_covariance()


def is_full_rank(case: dict[str, Any]) -> bool:
    return all(len(features) > features.shape[1] for features in features_of(case))


def absolute(case: dict[str, Any]) -> float:
    return number(case["tolerance"], "# absolute", 1e-2)


def distances(case: dict[str, Any]) -> list[float]:
    first, second = features_of(case)
    return [frechet_distance(*moments_of(first), *moments_of(second)), frechet_distance_of_features(first, second)]


@each(FID)
def test_frechet_distance(case):
    tolerance = dict(rel=number(case["tolerance"], "# relative")) if is_full_rank(case) else dict(abs=absolute(case))
    assert distances(case) == [pytest.approx(case["value"], **tolerance)] * 2


@each(FID)
def test_moments(case):
    known = stored(case)
    for which, features in enumerate(features_of(case), start=1):
        for name, value in zip(("mu", "sigma"), moments_of(features), strict=True):
            if f"{name}{which}" in known:
                np.testing.assert_allclose(value.numpy(), known[f"{name}{which}"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "fact"), json_facts("fid"))
def test_printed_distance(name, fact):
    found = [case for case in FID if case["case"] == f"fid_{name}"] or \
        [case for case in FID if case["value"] == pytest.approx(fact["value"], rel=1e-12)]
    if not found:
        pytest.skip("there are no features")
    for distance in distances(found[0]):
        if is_full_rank(found[0]):
            assert f"{distance:g}" == fact["printed"]
        else:
            assert float(f"{distance:g}") == pytest.approx(float(fact["printed"]), abs=absolute(found[0]))
