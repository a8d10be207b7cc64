"""Which images are labelled, unlabelled and held out."""
from __future__ import annotations

from typing import Any

import numpy as np

from DASO.lib.data.sets import select
from tests.golden.daso_cases import each, numbers, of_file, serves, stored

CASES = of_file("splits.npz")
SERVES = serves(CASES)


@each(CASES)
def test_selection(case: dict[str, Any]) -> None:
    seed, classes, per_class = numbers(case["labels_recipe"])
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), per_class))
    given, what, wanted = case["config"], case["what"], stored(case)
    pool_alone = what.startswith("stl10")  # its unlabelled images are a set of their own
    supervised = "algorithm Supervised" in what
    labelled, valid, unlabelled = select(
        labels, classes, given["SEED"], head=given["N1"], factor=given["gamma_l"], num_valid=given["NUM_VALID"],
        unlabelled_head=None if pool_alone else given["M1"], unlabelled_factor=1 if supervised else given["gamma_u"],
        reverse=given["REVERSE_UL"], holdout=given["PER_CLASS_VALID_SAMPLES"])
    parts = {"labeled_idx": labelled, "valid_idx": valid, "unlabeled_idx": unlabelled, "labeled_y": labels[labelled]}
    if unlabelled is not None:
        parts["unlabeled_y"] = labels[unlabelled]
    counts = np.bincount(labels[labelled], minlength=classes)
    order = np.argsort(-counts, kind="stable")
    parts["num_samples_per_class"] = np.stack([order, counts[order]], axis=1)
    for name, value in wanted.items():
        np.testing.assert_array_equal(parts[name], value, err_msg=name)
