"""Fréchet distances of given features, as the published code computes and prints them."""
import numpy as np
import pytest
import torch

from EDM.metrics.metrics import Moments, frechet_distance, frechet_distance_of_features
from tests.golden.cases import arrays, facts, index

CASES = [case for case in index("edm")["cases"] if case["kind"] == "fid"]


def features_of(case: dict) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays("edm", case["file"])[f"{case['case']}/features{which}"]) for which in (1, 2)]


def moments_of(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance, in batches of which the last is smaller."""
    moments = Moments(features.shape[1])
    for batch in features.split(7):
        moments.add(batch)
    return moments.mean_and_covariance()


def is_full_rank(case: dict) -> bool:
    return all(len(features) > features.shape[1] for features in features_of(case))


def distances(case: dict) -> list[float]:
    first, second = features_of(case)
    return [frechet_distance(*moments_of(first), *moments_of(second)), frechet_distance_of_features(first, second)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_frechet_distance(case):
    tolerance = dict(rel=1e-6) if is_full_rank(case) else dict(abs=1e-2)
    assert distances(case) == [pytest.approx(case["value"], **tolerance)] * 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_moments(case):
    known = {name: array for name, array in arrays("edm", case["file"]).items() if name.startswith(case["case"] + "/")}
    for which, features in enumerate(features_of(case), start=1):
        for name, value in zip(("mu", "sigma"), moments_of(features), strict=True):
            expected = known.get(f"{case['case']}/{name}{which}")
            if expected is not None:
                np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", facts("edm", "misc.json")["fid"])
def test_printed_distance(name):
    fact = facts("edm", "misc.json")["fid"][name]
    case = next(case for case in CASES if case["case"] == f"fid_{name}")
    for distance in distances(case):
        if is_full_rank(case):
            assert f"{distance:g}" == fact["printed"]
        else:
            assert float(f"{distance:g}") == pytest.approx(float(fact["printed"]), abs=1e-2)
