"""How the DDAE cases state and check closeness, and how their arrays are found."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from tests.golden.cases import arrays, index

NUMBER = r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)"


def cases(file: str) -> list[dict[str, Any]]:
    """Return the cases of one npz file."""
    return [case for case in index("ddae")["cases"] if case["file"] == file]


def given(case: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of a case, key -> array."""
    stored = arrays("ddae", case["file"])
    return {key: stored[f"{case['id']}/{key}"] for key in case["keys"] if key.startswith(prefix)}


def tensors(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.array(value)) for key, value in given(case).items()}


def served(found: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return what identifies the cases: (file, id)."""
    return {(case["file"], case["id"]) for case in found}


def stated(tolerance: str, word: str) -> str:
    """Return the part of a tolerance that speaks of `word`: parts are separated by semicolons or commas, and a part of
    names alone belongs to the one before it. Raises LookupError where there is none."""
    found = None
    for part in re.split("[;,]", re.sub(r"\(.*?\)", "", tolerance)):
        found = part if found is None or re.search(r"\d", part) else found + "," + part
        if re.search(rf"(?<!\w){word}(?!\w)", part):
            return found
    raise LookupError(f"{tolerance!r} says nothing of {word}")


def assert_close(ours: Any, reference: Any, tolerance: str, name: str = "") -> None:
    """Check an array against a stated tolerance.

    "exact"; "relative R"; a number: largest absolute difference, times max(1, max|ref|) where the text says so; both
    ("A relative R"): the looser of the two, per element.
    """
    ours = ours.detach() if isinstance(ours, torch.Tensor) else ours
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"{name}: shape {ours.shape}, expected {reference.shape}"
    difference = np.abs(ours - reference)
    relative = re.search(rf"relative {NUMBER}", tolerance)
    rest = tolerance.replace(relative[0], "") if relative else tolerance
    absolute = re.search(rf"(?<![\w.]){NUMBER}", rest)
    if absolute is None and relative is None:
        assert "exact" in tolerance, f"no tolerance in {tolerance!r}"
        assert not difference.any(), f"{name}: not exact, {difference.max():.3g} apart"
        return
    allowed = np.zeros_like(reference)
    if absolute is not None:
        scale = max(1.0, float(np.abs(reference).max(initial=0))) if "max(1" in rest else 1.0
        allowed = allowed + float(absolute[1]) * scale
    if relative is not None:
        allowed = np.maximum(allowed, float(relative[1]) * np.abs(reference))
    worst = np.unravel_index(np.argmax(difference - allowed), difference.shape)
    assert (difference <= allowed).all(), (
        f"{name}{list(worst)}: {ours[worst]:.8g}, expected {reference[worst]:.8g}, {difference[worst]:.3g} apart")
