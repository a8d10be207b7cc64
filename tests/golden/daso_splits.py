"""Which images are labelled, unlabelled and held out."""
from __future__ import annotations

import numpy as np

from DASO.lib.data.sets import select
from tests.golden.cases import each, serves
from tests.golden.daso_cases import Case, cases_of, stored
from tests.golden.recipes import assigned

SPLITS = cases_of("split")
SERVES = serves(SPLITS)


@each(SPLITS)
def test_selection(case: Case) -> None:
    labels = np.asarray(assigned(case["labels_recipe"])["y"])
    classes = int(labels.max()) + 1
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
