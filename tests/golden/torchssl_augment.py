"""RandAugment, Cutout, the weak transform and rotations, with every draw given."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from shared.augment.randaugment import OPERATIONS, RANGES, apply
from shared.augment.views import StrongDraws, WeakDraws, cutout, normalise, rotate_quarter_turns, strong, weak
from tests.golden.cases import arrays, each, facts, serves, tolerance, whole
from tests.golden.torchssl_cases import PAPER, cases_of, draw_inputs, expected

OPERATION_CASES, CUTOUTS, PLANS = cases_of("operation"), cases_of("cutout"), cases_of("randaugment")
WEAK, ROTATIONS = cases_of("weak transform"), cases_of("rotation")
SERVES = serves(OPERATION_CASES, CUTOUTS, PLANS, WEAK, ROTATIONS)


def image(case: dict[str, Any], name: str) -> torch.Tensor:
    """Return uint8 [1, C, H, W]; the arrays hold row, column, channel."""
    return torch.from_numpy(arrays(PAPER, case["file"])[f"image_{name}"]).permute(2, 0, 1).unsqueeze(0)


def rows_columns_channels(images: torch.Tensor) -> np.ndarray:
    return images[0].permute(1, 2, 0).numpy()


@each(OPERATION_CASES)
def test_operation(case: dict[str, Any]) -> None:
    operation = re.search(r"operation (\w+)", case["what"])[1]
    assert tuple(case["arguments"]["range_in_policy"]) == RANGES[operation]
    for name, wanted in expected(case).items():
        which, value = name.split("@")
        ours = apply(image(case, which), np.array([[OPERATIONS.index(operation)]]), np.array([[float(value)]]))
        np.testing.assert_array_equal(rows_columns_channels(ours), wanted, err_msg=name)


@each(CUTOUTS)
def test_cutout(case: dict[str, Any]) -> None:
    for name, wanted in expected(case).items():
        which, fraction, x, y = re.fullmatch(r"(\w+)@v(\S+)_x(\S+)_y(\S+)", name).groups()
        nothing = np.zeros((1, 0))
        draws = StrongDraws(nothing, nothing, np.array([float(fraction)]), np.array([[float(x), float(y)]]))
        np.testing.assert_array_equal(rows_columns_channels(cutout(image(case, which), draws)), wanted, err_msg=name)


@each(PLANS)
def test_randaugment_scripted(case: dict[str, Any]) -> None:
    plans, wanted = case["arguments"]["plans"], expected(case)
    draws = StrongDraws(np.array([[OPERATIONS.index(name) for name, _ in plan["ops"]] for plan in plans]),
                        np.array([[value for _, value in plan["ops"]] for plan in plans]),
                        np.array([plan["cutout_fraction"] for plan in plans]),
                        np.array([plan["cutout_centre"] for plan in plans]))
    ours = strong(torch.cat([image(case, plan["image"]) for plan in plans]), draws)
    for i, name in enumerate(case["output_keys"]):
        np.testing.assert_array_equal(rows_columns_channels(ours[i:i + 1]), wanted[name], err_msg=name)


@each(WEAK)
def test_weak_transform(case: dict[str, Any]) -> None:
    statistics = facts(PAPER, "normalisation.json")
    images = image(case, re.search(r"image_(\w+)", case["note"])[1])
    for name, wanted in expected(case).items():
        dataset, _, what = name.partition("_")
        mean, std = statistics["mean"][dataset], statistics["std"][dataset]
        if what == "eval":
            ours = normalise(images, mean, std)
        else:
            flip, row, column = map(int, re.fullmatch(r"flip(\d)_crop(\d+)_(\d+)", what).groups())
            padding = whole(case["what"], "padded by #")
            draws = WeakDraws(np.array([bool(flip)]), np.array([row - padding]), np.array([column - padding]),
                              tuple(images.shape[2:]))
            ours = weak(images, draws, mean, std)
        np.testing.assert_allclose(ours[0].numpy(), wanted, **tolerance(case["tolerance"]), err_msg=name)


@each(ROTATIONS)
def test_rotation_task(case: dict[str, Any]) -> None:
    (x,), wanted = draw_inputs(case).values(), expected(case)
    turns = [angle // 90 for angle in case["arguments"]["angles"]]
    ours = rotate_quarter_turns(x.expand(len(turns), *x.shape), np.array(turns))
    for i, name in enumerate(case["output_keys"]):
        np.testing.assert_array_equal(ours[i].numpy(), wanted[name], err_msg=name)
