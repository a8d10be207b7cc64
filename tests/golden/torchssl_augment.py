"""RandAugment, Cutout, the weak transform and rotations, with every draw given."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from shared.augment.randaugment import OPERATIONS, RANGES, apply
from shared.augment.views import StrongDraws, WeakDraws, cutout, normalise, rotate_quarter_turns, strong, weak
from tests.golden.cases import arrays, facts, index


def augment_cases(prefix: str = "") -> list[dict[str, Any]]:
    return [case for case in index("torchssl")["cases"]
            if case["file"] == "augment.npz" and case["id"].startswith(prefix)]


def operation_cases() -> list[dict[str, Any]]:
    return augment_cases("op_")


SERVES = {case["id"] for case in operation_cases()} | {
    "cutout", "randaugment_scripted", "weak_transform", "rotation_task"}


def image(name: str) -> torch.Tensor:
    """Return uint8 [1, C, H, W]; the arrays hold row, column, channel."""
    return torch.from_numpy(arrays("torchssl", "augment.npz")[f"image_{name}"]).permute(2, 0, 1).unsqueeze(0)


def expected(key: str) -> np.ndarray:
    return arrays("torchssl", "augment.npz")[key]


def rows_columns_channels(images: torch.Tensor) -> np.ndarray:
    return images[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("case", operation_cases(), ids=lambda case: case["id"])
def test_operation(case: dict[str, Any]) -> None:
    operation = case["id"].removeprefix("op_")
    assert tuple(case["arguments"]["range_in_policy"]) == RANGES[operation]
    for name, key in case["output_keys"].items():
        which, value = name.split("@")
        ours = apply(image(which), np.array([[OPERATIONS.index(operation)]]), np.array([[float(value)]]))
        np.testing.assert_array_equal(rows_columns_channels(ours), expected(key), err_msg=name)


@pytest.mark.parametrize("case", augment_cases("cutout"), ids=lambda case: case["id"])
def test_cutout(case: dict[str, Any]) -> None:
    for name, key in case["output_keys"].items():
        which, fraction, x, y = re.fullmatch(r"(\w+)@v(\S+)_x(\S+)_y(\S+)", name).groups()
        nothing = np.zeros((1, 0))
        draws = StrongDraws(nothing, nothing, np.array([float(fraction)]), np.array([[float(x), float(y)]]))
        np.testing.assert_array_equal(rows_columns_channels(cutout(image(which), draws)), expected(key), err_msg=name)


@pytest.mark.parametrize("case", augment_cases("randaugment_scripted"), ids=lambda case: case["id"])
def test_randaugment_scripted(case: dict[str, Any]) -> None:
    plans = case["arguments"]["plans"]
    draws = StrongDraws(np.array([[OPERATIONS.index(name) for name, _ in plan["ops"]] for plan in plans]),
                        np.array([[value for _, value in plan["ops"]] for plan in plans]),
                        np.array([plan["cutout_fraction"] for plan in plans]),
                        np.array([plan["cutout_centre"] for plan in plans]))
    ours = strong(torch.cat([image(plan["image"]) for plan in plans]), draws)
    for i, key in enumerate(case["output_keys"].values()):
        np.testing.assert_array_equal(rows_columns_channels(ours[i:i + 1]), expected(key), err_msg=key)


@pytest.mark.parametrize("case", augment_cases("weak_transform"), ids=lambda case: case["id"])
def test_weak_transform(case: dict[str, Any]) -> None:
    statistics = facts("torchssl", "normalisation.json")
    for name, key in case["output_keys"].items():
        dataset, _, what = name.partition("_")
        mean, std = statistics["mean"][dataset], statistics["std"][dataset]
        if what == "eval":
            ours = normalise(image("noise"), mean, std)
        else:
            flip, row, column = map(int, re.fullmatch(r"flip(\d)_crop(\d+)_(\d+)", what).groups())
            padding = int(re.search(r"reflect-padded by (\d+)", case["what"])[1])
            draws = WeakDraws(np.array([bool(flip)]), np.array([row - padding]), np.array([column - padding]),
                              tuple(image("noise").shape[2:]))
            ours = weak(image("noise"), draws, mean, std)
        np.testing.assert_allclose(ours[0].numpy(), expected(key), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", augment_cases("rotation_task"), ids=lambda case: case["id"])
def test_rotation_task(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["inputs"]["seed"])
    (entry,) = case["inputs"]["recipe"]
    x = torch.from_numpy(rng.standard_normal(entry["shape"]).astype(np.float32))
    turns = [angle // 90 for angle in case["arguments"]["angles"]]
    ours = rotate_quarter_turns(x.expand(len(turns), *x.shape), np.array(turns))
    for i, key in enumerate(case["output_keys"].values()):
        np.testing.assert_array_equal(ours[i].numpy(), expected(key), err_msg=key)
