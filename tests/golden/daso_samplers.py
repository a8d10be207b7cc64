"""The order in which images are drawn."""
from __future__ import annotations

import random
import re

import numpy as np
import torch

from DASO.lib.data.batches import draw_pass, sampling_weights
from DASO.lib.losses import class_weights
from tests.golden.cases import each, number, numbers, serves
from tests.golden.daso_cases import Case, cases_of, stored

RANDOM, AWARE = cases_of("permutations"), cases_of("weighted draws")
SERVES = serves(RANDOM, AWARE)


@each(RANDOM)
def test_permutations(case: Case) -> None:
    for key, wanted in stored(case).items():
        size, total, seed = map(int, key.split("_"))
        torch.manual_seed(seed)
        passes = [draw_pass(size) for _ in range(-(-total // size))]
        np.testing.assert_array_equal(np.concatenate(passes)[:total], wanted, err_msg=key)


@each(AWARE)
def test_weighted_draws(case: Case) -> None:
    counts = numbers(re.search(r"\[[\d, ]+\]", case["what"])[0])
    for key, wanted in stored(case).items():
        seed, beta, kind = key.split("_")
        seed, beta = int(seed.removeprefix("s")), float(beta.removeprefix("b"))
        if kind == "probs":  # the published log shows the weights; the shares drawn are all nearly alike
            weights = class_weights(counts, beta)
            allowed = number(case["tolerance"], "probs #")
            np.testing.assert_allclose(weights / weights.sum(), wanted, atol=allowed, err_msg=key)
            continue
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
        torch.manual_seed(seed)
        random.seed(seed)
        weights, found = sampling_weights(labels, len(counts), beta)[0], []
        while len(found) < len(wanted):
            drawn = draw_pass(len(weights), weights).tolist()
            if kind != "nosh":
                random.shuffle(drawn)
            found += drawn
        np.testing.assert_array_equal(found[:len(wanted)], wanted, err_msg=key)
