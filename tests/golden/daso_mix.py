"""The interleaving of chunks in MixMatch and ReMixMatch."""
from __future__ import annotations

import re

import numpy as np

from shared.augment.mixing import group_offsets, interleaved
from tests.golden.cases import each, serves, whole
from tests.golden.daso_cases import Case, cases_of, stored

INTERLEAVED = cases_of("interleaving")
SERVES = serves(INTERLEAVED)


@each(INTERLEAVED)
def test_interleaving(case: Case) -> None:
    step = whole(case["what"], r"\+#\*i")
    for key, wanted in stored(case).items():
        size, views = map(int, re.match(r"b(\d+)_nu(\d+)", key).groups())
        if key.endswith("_offsets"):
            assert group_offsets(size, views + 1) == wanted.tolist(), key
        else:
            chunk, row = np.divmod(interleaved(views + 1, size), size)
            np.testing.assert_array_equal(row + step * chunk, wanted, err_msg=key)
