"""Class counts of long-tailed sets."""
from __future__ import annotations

from typing import Any

import numpy as np

from DASO.lib.data.sets import long_tail_counts
from tests.golden.daso_cases import each, of_file, serves, stored

CASES = of_file("longtail.npz")
COUNTS = [case for case in CASES if case["name"] == "counts"]
RELATIVE = [case for case in CASES if case["name"] == "normcounts"]
SERVES = serves(COUNTS + RELATIVE)


@each(COUNTS)
def test_counts(case: dict[str, Any]) -> None:
    for key, wanted in stored(case).items():
        head, gamma, classes, direction = key.split("_")
        found = long_tail_counts(int(head), float(gamma), int(classes), direction == "rev")
        np.testing.assert_array_equal(found, wanted, err_msg=key)


@each(RELATIVE)
def test_relative_counts(case: dict[str, Any]) -> None:
    for key, wanted in stored(case).items():
        head, gamma, classes = key.split("_")
        counts = long_tail_counts(int(head), float(gamma), int(classes))
        found = np.round(counts / counts.min(), 1)
        np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=float(case["tolerance"]), err_msg=key)
