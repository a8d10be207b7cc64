"""Schedules, labelled splits and streams, transforms, accuracy and evaluation."""
from __future__ import annotations

import hashlib
import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from MetaSemi.core.data import NORMALISATION, Stream, label_text, split, streams
from MetaSemi.core.evaluation import accuracy, evaluate
from MetaSemi.core.meta import CosAnnealingLR, compute_weight, learning_rate
from shared.augment.views import WeakDraws, normalise, weak
from shared.distributed import World
from tests.golden.cases import arrays, index

MISC = index("metasemi")["misc"]
CASES = MISC["cases"]


def named(*fields: str) -> list[str]:
    """Return the cases that have all these fields."""
    return [name for name, case in CASES.items() if all(field in case for field in fields)]


RATES, WEIGHTS, COSINES = named("milestones"), named("rampup"), named("loader_len")
SPLITS, ACCURACIES, EVALUATIONS = named("targets_recipe"), named("topk"), named("batch_sizes")
TRANSFORMS = named("crop_top_left_in_padded_image")
SERVES = {("misc", name) for name in RATES + WEIGHTS + COSINES + SPLITS + ACCURACIES + EVALUATIONS + TRANSFORMS}


def stored(key: str) -> np.ndarray:
    return arrays("metasemi", MISC["file"])[key]


def tolerance(case: dict[str, Any]) -> dict[str, float]:
    return {"rtol": 0, **{kind: float(value) for kind, value in
                          re.findall(r"(atol|rtol) ([\d.]+(?:e-?\d+)?)", case["tolerance"])}}


@pytest.mark.parametrize("name", RATES)
def test_learning_rate(name: str) -> None:
    case = CASES[name]
    found = [learning_rate(step, *(case[key] for key in ("lr", "warmup", "gamma", "milestones")))
             for step in case["steps"]]
    np.testing.assert_allclose(found, stored(case["key"]), **tolerance(case))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight(name: str) -> None:
    case = CASES[name]
    found = [compute_weight(case["weight"], step, case["rampup"]) for step in case["steps"]]
    np.testing.assert_allclose(found, stored(case["key"]), **tolerance(case))


@pytest.mark.parametrize("name", COSINES)
def test_cosine(name: str) -> None:
    case = CASES[name]
    schedule = CosAnnealingLR(*(case[key] for key in ("loader_len", "epochs", "lr_max", "warmup_epochs",
                                                      "last_epoch")))
    found = [schedule.step() for _ in range(case["calls"])]
    np.testing.assert_allclose(found, stored(case["key"]), **tolerance(case))


def targets_of(recipe: str) -> np.ndarray:
    """Return the labels that a recipe such as np.random.default_rng(1).integers(0,10,300) describes."""
    rng = np.random.default_rng(int(re.search(r"default_rng\((\d+)\)", recipe)[1]))
    method, arguments = re.search(r"\)\.(\w+)\((.*)\)$", recipe).groups()
    if method == "integers":
        return rng.integers(*map(int, arguments.split(",")))
    classes, count, shares = re.fullmatch(r"(\d+),(\d+),p=\[(.*)\]", arguments).groups()
    return rng.choice(int(classes), int(count), p=[float(share) for share in shares.split(",")])


def sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(values, "<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("name", SPLITS)
def test_split_and_streams(name: str) -> None:
    case = CASES[name]
    rng = random.Random(case["seed"])
    labeled, unlabeled = split(targets_of(case["targets_recipe"]), case["labels_per_class"], rng)
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
            np.testing.assert_array_equal(values, stored(case["keys"][key]), err_msg=key)
        if f"{key}_first" in case:
            assert values[:len(case[f"{key}_first"])].tolist() == case[f"{key}_first"], key
        if f"{key}_sha256_int64_le" in case:
            assert sha256(values) == case[f"{key}_sha256_int64_le"], key


@pytest.mark.parametrize("name", SPLITS)
def test_stream_entered_in_the_middle(name: str) -> None:
    """A run that is resumed goes on where it was."""
    case = CASES[name]
    batch, length = case["batch_size"], case["num_iters"] * case["batch_size"]
    whole, late = (Stream(range(7 * batch // 5), length, random.Random(case["seed"])) for _ in range(2))
    begin = length // 2
    np.testing.assert_array_equal(whole.take(0, length)[begin:], late.take(begin, length - begin))


@pytest.mark.parametrize("name", ACCURACIES)
def test_accuracy(name: str) -> None:
    case = CASES[name]
    logits, target, wanted = map(stored, case["keys"])
    found = accuracy(torch.from_numpy(logits), torch.from_numpy(target), tuple(case["topk"]))
    assert all(value.shape == (1,) for value in found)
    np.testing.assert_allclose(torch.cat(found), wanted, **tolerance(case))


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluate(name: str) -> None:
    case = CASES[name]
    logits, target = (torch.from_numpy(stored(key)).split(case["batch_sizes"]) for key in ("acc/logits", "acc/target"))
    found = evaluate(torch.nn.Identity(), zip(logits, target, strict=True), World())[0]
    np.testing.assert_allclose(found, stored(case["key"]), **tolerance(case))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str) -> None:
    case = CASES[name]
    mean, std = NORMALISATION[name.removeprefix("transform_")]
    assert (list(mean), list(std)) == (case["mean"], case["std"])
    image, test, train = map(stored, case["keys"])
    images = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    np.testing.assert_allclose(normalise(images, mean, std)[0], test, **tolerance(case))
    top, left = (place - 4 for place in case["crop_top_left_in_padded_image"])
    if case["flip"]:
        left = -left  # here the image is mirrored before the window is cut out
    draws = WeakDraws(np.array([case["flip"]]), np.array([top]), np.array([left]), image.shape[:2], "zero")
    np.testing.assert_allclose(weak(images, draws, mean, std)[0], train, **tolerance(case))
