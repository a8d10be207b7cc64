"""What CReST adds to the labelled set."""
from __future__ import annotations

import re

import numpy as np
import torch

from DASO.lib.algorithm.self_training import sampling_rates, select
from tests.golden.cases import arrays, index

CASES = [case for case in index("daso")["cases"] if case["file"] == "crest.npz"]
SERVES = {case["name"] for case in CASES}
FIRST_UNLABELLED = 10000  # the number of the first unlabelled image in the case's lists


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
        truth = np.repeat(np.arange(classes), given["labelled_counts"])
        labels = np.concatenate([truth, label.numpy()])
        np.testing.assert_array_equal(np.concatenate([np.arange(len(truth)), FIRST_UNLABELLED + added.numpy()]),
                                      stored[f"{name}/new_idx"])
        np.testing.assert_array_equal(labels, stored[f"{name}/new_labels"])
        np.testing.assert_array_equal(np.bincount(labels, minlength=classes), stored[f"{name}/new_counts"])
