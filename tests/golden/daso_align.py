"""Distribution alignment over many successive batches."""
from __future__ import annotations

import re

import numpy as np
import torch

from DASO.lib.algorithm.fixmatch import DistributionAlignment
from DASO.lib.algorithm.interface import Setting
from tests.golden.cases import each, serves
from tests.golden.daso_cases import Case, cases_of, close, stored
from tests.golden.recipes import Normal, computed

ALIGNMENTS = cases_of("alignment")
SERVES = serves(ALIGNMENTS)


@each(ALIGNMENTS)
def test_alignment(case: Case) -> None:
    wanted, normal = stored(case), Normal(np.random.default_rng(case["seed"]))
    outputs = {int(key.removeprefix("out")): value for key, value in wanted.items() if re.fullmatch(r"out\d+", key)}
    formula = re.search(r"p ?= ?softmax\((.*?)\), exponent", case["what"])[1]
    said = re.search(r"exponent (\S+) cyclically", case["what"])[1].split("/")
    exponents = [case["default_exponent"] if text == "None" else float(text) for text in said]
    alignment = DistributionAlignment(torch.from_numpy(wanted["target"]), Setting(case["K"], (1,) * case["K"]))
    for call in range(1 + max(outputs)):
        logits = computed(formula, normal=normal, B=case["B"], K=case["K"]).astype(np.float32)
        found = alignment(torch.from_numpy(logits).softmax(1), exponents[call % len(exponents)])
        if call in outputs:
            close(found, outputs[call], case, f"call {call}")
