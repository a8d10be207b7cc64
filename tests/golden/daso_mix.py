"""The interleaving of chunks in MixMatch and ReMixMatch."""
from __future__ import annotations

import re

import numpy as np

from shared.augment.mixing import group_offsets, interleaved
from tests.golden.cases import arrays
from tests.golden.daso_cases import of_file, serves

CASES = of_file("mix.npz")
SERVES = serves(CASES)


def test_interleaving() -> None:
    for case in CASES:
        stored = arrays("daso", case["file"])
        step = int(re.search(r"\+(\d+)\*i", case["what"])[1])
        for key in case["keys"]:
            size, views = map(int, re.search(r"b(\d+)_nu(\d+)", key).groups())
            if key.endswith("_offsets"):
                assert group_offsets(size, views + 1) == stored[key].tolist(), key
            else:
                chunk, row = np.divmod(interleaved(views + 1, size), size)
                np.testing.assert_array_equal(row + step * chunk, stored[key], err_msg=key)
