"""What CReST adds to the labelled set."""
from __future__ import annotations

import re

import numpy as np
import torch

from DASO.lib.algorithm.crest import sampling_rates, select
from tests.golden.cases import each, number, serves, whole
from tests.golden.daso_cases import Case, cases_of, stored
from tests.golden.recipes import Normal, computed

EXPANSIONS = cases_of("crest")
SERVES = serves(EXPANSIONS)


@each(EXPANSIONS)
def test_expansion(case: Case) -> None:
    given, wanted, classes = case["ctor"], stored(case), case["ctor"]["K"]
    rates = sampling_rates(given["labelled_counts"], given["ALPHA"])
    formula = re.search(r"softmax\((.*)\)", case["recipe"])[1]
    formula = re.sub(r"(linspace\([^)]*\)) as float32", r"float32(\1)", formula)
    normal = Normal(np.random.default_rng(whole(case["recipe"], "seed #")))
    logits = np.float32(computed(formula, normal=normal, n=given["n_unlabelled"], K=classes))
    added, label = select(torch.from_numpy(logits).softmax(1), rates)

    first = whole(case["what"], r"unlabelled #\.\.")  # number of the first unlabelled image
    truth = np.repeat(np.arange(classes), given["labelled_counts"])
    labels = np.concatenate([truth, label.numpy()])
    found = {"new_idx": np.concatenate([np.arange(len(truth)), first + added.numpy()]), "new_labels": labels,
             "new_counts": np.bincount(labels, minlength=classes)}
    for key, value in wanted.items():
        if key == "mu":
            np.testing.assert_allclose(rates, value, rtol=number(case["tolerance"], "mu #"))
        else:
            np.testing.assert_array_equal(found[key], value, err_msg=key)
