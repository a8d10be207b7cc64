"""Labelled splits: the same images for the same seed as the published code."""
from __future__ import annotations

from typing import Any

import numpy as np

from tests.golden.cases import each, serves
from tests.golden.recipes import computed
from tests.golden.torchssl_cases import cases_of, expected
from TorchSSL.core.labels import class_balanced_split

SPLITS = cases_of("split")
# How a data-loading order came about; the stored note says it need not be matched.
SERVES = serves(SPLITS, cases_of("informational"))


@each(SPLITS)
def test_labelled_indices(case: dict[str, Any]) -> None:
    given = case["arguments"]
    labels = np.asarray(computed(given["labels"]))
    found = class_balanced_split(labels, given["num_labels"], given["num_classes"], given["seed"])
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected(case)["index"])
