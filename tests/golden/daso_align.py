"""Distribution alignment over many successive batches."""
from __future__ import annotations

import numpy as np
import torch

from DASO.lib.algorithm.alignment import DistributionAlignment
from DASO.lib.algorithm.interface import Setting
from tests.golden.cases import arrays, index

CASES = [case for case in index("daso")["cases"] if case["file"] == "align.npz"]
SERVES = {case["name"] for case in CASES}
EXPONENTS = (None, None, 0.5, 0.8)  # of successive calls, cyclically, as the case says


def test_alignment() -> None:
    for case in CASES:
        stored, rng = arrays("daso", case["file"]), np.random.default_rng(case["seed"])
        outputs = {int(key.rpartition("out")[2]): key for key in case["keys"] if "/out" in key}
        target = torch.from_numpy(stored[f"{case['name']}/target"])
        alignment = DistributionAlignment(target, Setting(case["K"], (1,) * case["K"]))
        for call in range(max(outputs) + 1):
            logits = 2 * rng.standard_normal((case["B"], case["K"])).astype(np.float32)
            exponent = EXPONENTS[call % len(EXPONENTS)]
            exponent = case["default_exponent"] if exponent is None else exponent
            found = alignment(torch.from_numpy(logits).softmax(1), exponent)
            if call in outputs:
                np.testing.assert_allclose(found, stored[outputs[call]], rtol=1e-4, atol=1e-5, err_msg=outputs[call])
