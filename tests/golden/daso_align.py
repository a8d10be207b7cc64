"""Distribution alignment over many successive batches."""
from __future__ import annotations

import re

import numpy as np
import torch

from DASO.lib.algorithm.fixmatch import DistributionAlignment
from DASO.lib.algorithm.interface import Setting
from tests.golden.cases import arrays
from tests.golden.daso_cases import of_file, serves, tolerance

CASES = of_file("align.npz")
SERVES = serves(CASES)


def test_alignment() -> None:
    for case in CASES:
        stored, rng = arrays("daso", case["file"]), np.random.default_rng(case["seed"])
        outputs = {int(key.rpartition("out")[2]): key for key in case["keys"] if "/out" in key}
        target = torch.from_numpy(stored[f"{case['name']}/target"])
        scale = float(re.search(r"softmax\(([\d.]+)\*normal", case["what"])[1])
        said = re.search(r"exponent (\S+) cyclically", case["what"])[1].split("/")
        exponents = [case["default_exponent"] if text == "None" else float(text) for text in said]
        alignment = DistributionAlignment(target, Setting(case["K"], (1,) * case["K"]))
        for call in range(max(outputs) + 1):
            logits = scale * rng.standard_normal((case["B"], case["K"])).astype(np.float32)
            found = alignment(torch.from_numpy(logits).softmax(1), exponents[call % len(exponents)])
            if call in outputs:
                np.testing.assert_allclose(found, stored[outputs[call]], err_msg=outputs[call], **tolerance(case))
