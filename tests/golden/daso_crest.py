"""What CReST adds to the labelled set."""
from __future__ import annotations

import re

import numpy as np
import torch

from DASO.lib.algorithm.crest import sampling_rates, select
from tests.golden.cases import arrays
from tests.golden.daso_cases import of_file, serves

CASES = of_file("crest.npz")
SERVES = serves(CASES)


def test_expansion() -> None:
    for case in CASES:
        given, stored, name = case["ctor"], arrays("daso", case["file"]), case["name"]
        classes, count = given["K"], given["n_unlabelled"]
        scale, shift = re.search(r"softmax\(([\d.]+)\*normal\(\(n,K\)\) \+ linspace\(([\d.]+),0,K\)",
                                 case["recipe"]).groups()
        rng = np.random.default_rng(int(re.search(r"seed (\d+)", case["recipe"])[1]))
        logits = float(scale) * rng.standard_normal((count, classes)).astype(np.float32)
        logits = logits + np.linspace(float(shift), 0, classes).astype(np.float32)
        rates = sampling_rates(given["labelled_counts"], given["ALPHA"])
        np.testing.assert_allclose(rates, stored[f"{name}/mu"], rtol=1e-6)

        added, label = select(torch.from_numpy(logits).softmax(1), rates)
        first = int(re.search(r"unlabelled (\d+)\.\.", case["what"])[1])  # number of the first unlabelled image
        truth = np.repeat(np.arange(classes), given["labelled_counts"])
        labels = np.concatenate([truth, label.numpy()])
        np.testing.assert_array_equal(np.concatenate([np.arange(len(truth)), first + added.numpy()]),
                                      stored[f"{name}/new_idx"])
        np.testing.assert_array_equal(labels, stored[f"{name}/new_labels"])
        np.testing.assert_array_equal(np.bincount(labels, minlength=classes), stored[f"{name}/new_counts"])
