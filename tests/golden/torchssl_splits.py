"""Labelled splits: the same images for the same seed as the published code."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shared.data.classes import class_balanced_split
from tests.golden.cases import arrays, index

CASES = [case for case in index("torchssl")["cases"] if case["file"] == "splits.npz" and "labels" in
         case.get("arguments", {})]
# How a data-loading order came about; the stored note says it need not be matched.
INFORMATIONAL = {case["id"] for case in index("torchssl")["cases"] if case["file"] == "splits.npz"
                 and "not required to match" in str(case.get("tolerance"))}
SERVES = {case["id"] for case in CASES} | INFORMATIONAL


def labels_of(text: str) -> np.ndarray:
    """Return the labels that a case describes: arange(n) % C, as it is or permuted by default_rng(seed)."""
    numbers = [int(number) for number in "".join(c if c.isdigit() else " " for c in text).split()]
    if text.startswith("numpy.arange"):
        count, classes = numbers
        return np.arange(count) % classes
    seed, count, classes = numbers
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_labelled_indices(case: dict[str, Any]) -> None:
    given = case["arguments"]
    found = class_balanced_split(labels_of(given["labels"]), given["num_labels"], given["num_classes"], given["seed"])
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, arrays("torchssl", "splits.npz")[case["output_keys"]["index"]])
