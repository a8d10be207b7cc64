"""Views of images: each operation, cutout, and whole pipelines with the published use of random numbers."""
from __future__ import annotations

import random
import re

import numpy as np
import torch

from DASO.lib.data.augment import ALPHABETICAL, GREY, Look, magnitude, strong_draws
from DASO.lib.data.sets import CIFAR10_STATISTICS, CIFAR100_STATISTICS
from shared.augment.randaugment import OPERATIONS, apply
from shared.augment.views import StrongDraws, WeakDraws, WeakPolicy, cutout, strong
from tests.golden.cases import each, number, serves, whole
from tests.golden.daso_cases import Case, cases_of, named_array, stored

OPERATION_CASES, CUTOUTS = cases_of("operations"), cases_of("cutout")
RANDAUGMENTS, PIPELINES = cases_of("randaugment"), cases_of("pipelines")
SERVES = serves(OPERATION_CASES, CUTOUTS, RANDAUGMENTS, PIPELINES)
PAD, RESIZED = 4, 32
INPUT = r"([^\s;,]+/_input)\b"  # how the words of a case name the image that it starts from


def as_batch(image: np.ndarray) -> torch.Tensor:
    """Return uint8 [H, W, C] as [1, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def as_image(batch: torch.Tensor) -> np.ndarray:
    return batch[0].permute(1, 2, 0).numpy()


@each(OPERATION_CASES)
def test_operations(case: Case) -> None:
    wanted = stored(case)
    image = as_batch(wanted["_input"])
    for key, value in wanted.items():
        if key == "_input":
            continue
        name, level, sign = re.fullmatch(r"(\w+)_L(\d+)([pm])", key).groups()
        v = magnitude(name, int(level), sign == "m", tuple(image.shape[2:]))
        found = as_image(apply(image, np.array([[OPERATIONS.index(name)]]), np.array([[v]], np.float64)))
        np.testing.assert_array_equal(found, value, err_msg=key)


@each(CUTOUTS)
def test_cutout(case: Case) -> None:
    wanted, image = stored(case), as_batch(named_array(case, INPUT))
    grey = whole(case["what"], "grey #", GREY)
    for key, value in wanted.items():
        if key.endswith("_uniforms"):
            continue
        centre = wanted[f"{key}_uniforms"].astype(np.float64).reshape(1, 2)
        draws = strong_draws(np.zeros((1, 0), int), np.zeros((1, 0), bool), np.zeros((1, 0), int),
                             np.zeros((1, 0), bool), centre, tuple(image.shape[2:]))
        np.testing.assert_array_equal(as_image(cutout(image, draws, (grey,) * 3)), value, err_msg=key)


def published_strong(size: tuple[int, int], count: int = 2, magnitude: int = 10) -> StrongDraws:
    """Draw one strong augmentation as the published code does, from the global generators."""
    operations = random.choices(range(len(ALPHABETICAL)), k=count)
    applied, levels, negative = [], [], []
    for operation in operations:
        applied.append(random.random() <= 0.5)
        levels.append(np.random.randint(1, magnitude) if applied[-1] else 1)
        signed = ALPHABETICAL[operation] in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
        negative.append(applied[-1] and signed and random.random() < 0.5)
    centre = [[np.random.uniform(0, size[1]), np.random.uniform(0, size[0])]]
    return strong_draws(np.array([operations]), np.array([applied]), np.array([levels]), np.array([negative]),
                        np.array(centre), size)


@each(RANDAUGMENTS)
def test_randaugment(case: Case) -> None:
    image = as_batch(named_array(case, INPUT))
    count, magnitude = whole(case["what"], "# ops", 2), whole(case["what"], "magnitude #", 10)
    for key, wanted in stored(case).items():
        seed = int(key.removeprefix("s"))
        random.seed(seed)
        np.random.seed(seed)
        found = strong(image, published_strong(tuple(image.shape[2:]), count, magnitude), (GREY,) * 3)
        np.testing.assert_array_equal(as_image(found), wanted, err_msg=key)


@each(PIPELINES)
def test_whole_pipelines(case: Case) -> None:
    kept = stored(case)
    with_cifar100 = re.search(r"([\w, ]+) use the CIFAR-100", case["what"])
    own = [value for key, value in kept.items() if key.startswith("_input")]
    for key, wanted in kept.items():
        if key.startswith("_"):
            continue
        name, seed = re.fullmatch(r"(\w+)_s(\d+)", key).groups()
        is_stl = name.startswith("stl_")
        image = as_batch(own[0] if is_stl else named_array(case, INPUT))
        is_cifar100 = with_cifar100 is not None and name in re.split(r"\W+", with_cifar100[1])
        statistics = CIFAR100_STATISTICS if is_cifar100 else CIFAR10_STATISTICS
        look = Look(*statistics, RESIZED if is_stl else image.shape[3], WeakPolicy())
        kind = {"eval": "eval", "weak": "weak", "strong_rafirst": "strong",
                "strong_ralast": "strong_resized"}[re.sub(r"\d+$", "", name.removeprefix("stl_"))]
        random.seed(int(seed))
        np.random.seed(int(seed))
        torch.manual_seed(int(seed))
        weak_draws = strong_ = None
        if kind != "eval":
            flip = torch.rand(1).numpy() < 0.5
            top, left = (torch.randint(0, 2 * PAD + 1, (1,)).numpy() - PAD for _ in range(2))
            weak_draws = WeakDraws(flip, top, left, tuple(image.shape[2:]))
        if kind.startswith("strong"):
            side = look.side if kind == "strong_resized" else image.shape[3]
            strong_ = published_strong((side, side))
        found = look.view(image, kind, weak_draws, strong_)[0]
        # One grey level, where a resize rounds differently.
        allowed = number(case["tolerance"], "#")
        off = 1.01 / 255 / min(statistics[1]) if is_stl else allowed
        np.testing.assert_allclose(found, wanted, rtol=0, atol=off, err_msg=key)
        if is_stl:
            assert (np.abs(found.numpy() - wanted) > allowed).mean() < 0.01, key
