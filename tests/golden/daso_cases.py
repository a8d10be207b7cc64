"""What the golden cases of daso share: cases of a file, tolerances, inputs."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.golden.cases import arrays, index


def of_file(file: str) -> list[dict[str, Any]]:
    """Return the cases whose arrays lie in a file."""
    return [case for case in index("daso")["cases"] if case["file"] == file]


def serves(cases: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return what identifies cases: file and name, since two files may have cases of one name."""
    return {(case["file"], case["name"]) for case in cases}


def each(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


def stored(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the case's arrays by the rest of their key."""
    found = arrays("daso", case["file"])
    return {key.removeprefix(f"{case['name']}/"): found[key] for key in case["keys"]}


def tolerance(case: dict[str, Any]) -> dict[str, float]:
    """Return what a case says as assert_allclose takes it; a single number is absolute."""
    text = str(case["tolerance"])
    found = {name: float(number) for name, number in re.findall(r"(rtol|atol) ([\d.e-]+\d)", text)}
    if found:
        return {"rtol": 0.0, "atol": 0.0, **found}
    if text.startswith("exact"):
        return {"rtol": 0.0, "atol": 0.0}
    number = float(re.match(r"[\d.e-]+", text)[0])
    return {"rtol": number, "atol": 0.0} if "relative" in text else {"rtol": number, "atol": number}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def numbers(text: str) -> list[int]:
    """Return the integers of a text in order."""
    return [int(number) for number in re.findall(r"\d+", text)]
