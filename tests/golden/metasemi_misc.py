"""Schedules, labelled splits and streams, transforms, accuracy and evaluation."""
from __future__ import annotations

import hashlib
import random
import re

import numpy as np
import torch

from MetaSemi.core.data import NORMALISATION, Stream, label_text, split, streams
from MetaSemi.core.evaluation import accuracy, evaluate
from MetaSemi.core.meta import CosAnnealingLR, compute_weight, learning_rate
from shared.augment.views import WeakDraws, normalise, weak
from shared.distributed import World
from tests.golden.cases import each, tolerance
from tests.golden.metasemi_cases import Case, cases_of, stored
from tests.golden.recipes import computed

RATES, WEIGHTS = cases_of("misc", "milestones"), cases_of("misc", "rampup")
COSINES, SPLITS = cases_of("misc", "loader_len"), cases_of("misc", "targets_recipe")
ACCURACIES, EVALUATIONS = cases_of("misc", "topk"), cases_of("misc", "batch_sizes")
TRANSFORMS = cases_of("misc", "crop_top_left_in_padded_image")
SERVES = {("misc", case["name"]) for case in (*RATES, *WEIGHTS, *COSINES, *SPLITS, *ACCURACIES, *EVALUATIONS,
                                              *TRANSFORMS)}


@each(RATES)
def test_learning_rate(case: Case) -> None:
    found = [learning_rate(step, *(case[key] for key in ("lr", "warmup", "gamma", "milestones")))
             for step in case["steps"]]
    np.testing.assert_allclose(found, stored(case)[case["key"]], **tolerance(case["tolerance"]))


@each(WEIGHTS)
def test_weight(case: Case) -> None:
    found = [compute_weight(case["weight"], step, case["rampup"]) for step in case["steps"]]
    np.testing.assert_allclose(found, stored(case)[case["key"]], **tolerance(case["tolerance"]))


@each(COSINES)
def test_cosine(case: Case) -> None:
    schedule = CosAnnealingLR(*(case[key] for key in ("loader_len", "epochs", "lr_max", "warmup_epochs",
                                                      "last_epoch")))
    found = [schedule.step() for _ in range(case["calls"])]
    np.testing.assert_allclose(found, stored(case)[case["key"]], **tolerance(case["tolerance"]))


def sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(values, "<i8").tobytes()).hexdigest()


@each(SPLITS)
def test_split_and_streams(case: Case) -> None:
    rng = random.Random(case["seed"])
    labeled, unlabeled = split(np.asarray(computed(case["targets_recipe"])), case["labels_per_class"], rng)
    assert (len(labeled), len(unlabeled)) == (case["n_label"], case["n_unlabel"])
    text = label_text(labeled)
    assert text.splitlines()[:len(case["label_indices_txt_first_lines"])] == case["label_indices_txt_first_lines"]
    assert hashlib.sha256(text.encode()).hexdigest() == case["label_indices_txt_sha256"]
    length = case["num_iters"] * case["batch_size"]
    found = {"label": labeled, "unlabel": unlabeled}
    for key, stream in zip(("label_stream", "unlabel_stream"), streams(labeled, unlabeled, length, rng), strict=True):
        found[key] = np.concatenate([stream.take(step * case["batch_size"], case["batch_size"])
                                     for step in range(case["num_iters"])])
    for key, values in found.items():
        if key in case.get("keys", {}):
            np.testing.assert_array_equal(values, stored(case)[case["keys"][key]], err_msg=key)
        if f"{key}_first" in case:
            assert values[:len(case[f"{key}_first"])].tolist() == case[f"{key}_first"], key
        if f"{key}_sha256_int64_le" in case:
            assert sha256(values) == case[f"{key}_sha256_int64_le"], key


@each(SPLITS)
def test_stream_entered_in_the_middle(case: Case) -> None:
    """A run that is resumed goes on where it was."""
    batch, length = case["batch_size"], case["num_iters"] * case["batch_size"]
    whole, late = (Stream(range(7 * batch // 5), length, random.Random(case["seed"])) for _ in range(2))
    begin = length // 2
    np.testing.assert_array_equal(whole.take(0, length)[begin:], late.take(begin, length - begin))


@each(ACCURACIES)
def test_accuracy(case: Case) -> None:
    logits, target, wanted = (stored(case)[key] for key in case["keys"])
    found = accuracy(torch.from_numpy(logits), torch.from_numpy(target), tuple(case["topk"]))
    assert all(value.shape == (1,) for value in found)
    np.testing.assert_allclose(torch.cat(found), wanted, **tolerance(case["tolerance"]))


@each(EVALUATIONS)
def test_evaluate(case: Case) -> None:
    keys = re.search(r"from (\S+), (\S+) in order", case["what"]).groups()
    logits, target = (torch.from_numpy(stored(case)[key]).split(case["batch_sizes"]) for key in keys)
    found = evaluate(torch.nn.Identity(), zip(logits, target, strict=True), World())[0]
    np.testing.assert_allclose(found, stored(case)[case["key"]], **tolerance(case["tolerance"]))


@each(TRANSFORMS)
def test_transform(case: Case) -> None:
    mean, std = case["mean"], case["std"]
    assert (mean, std) in [(list(means), list(stds)) for means, stds in NORMALISATION.values()]
    image, test, train = (stored(case)[key] for key in case["keys"])
    images = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    np.testing.assert_allclose(normalise(images, mean, std)[0], test, **tolerance(case["tolerance"]))
    top, left = (place - case.get("padding", 4) for place in case["crop_top_left_in_padded_image"])
    if case["flip"]:
        left = -left  # here the image is mirrored before the window is cut out
    draws = WeakDraws(np.array([case["flip"]]), np.array([top]), np.array([left]), image.shape[:2], "zero")
    np.testing.assert_allclose(weak(images, draws, mean, std)[0], train, **tolerance(case["tolerance"]))
