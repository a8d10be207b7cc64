"""Class counts of long-tailed sets."""
from __future__ import annotations

import numpy as np

from DASO.lib.data.sets import long_tail_counts
from tests.golden.cases import each, serves
from tests.golden.daso_cases import Case, cases_of, close, stored

COUNTS, RELATIVE = cases_of("class counts"), cases_of("relative counts")
SERVES = serves(COUNTS, RELATIVE)


@each(COUNTS)
def test_counts(case: Case) -> None:
    for key, wanted in stored(case).items():
        head, gamma, classes, direction = key.split("_")
        found = long_tail_counts(int(head), float(gamma), int(classes), direction == "rev")
        np.testing.assert_array_equal(found, wanted, err_msg=key)


@each(RELATIVE)
def test_relative_counts(case: Case) -> None:
    for key, wanted in stored(case).items():
        head, gamma, classes = key.split("_")
        counts = long_tail_counts(int(head), float(gamma), int(classes))
        found = np.round(counts / counts.min(), 1)
        close(found.astype(np.float32), wanted, case, key)
