"""What the golden cases of EDM share."""
from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from tests.golden import cases as golden
from tests.golden.cases import bounds, facts

PAPER = "edm"
cases = functools.partial(golden.cases, PAPER)
tensors = functools.partial(golden.tensors, PAPER)


def json_facts(key: str) -> Any:
    """Return what the JSON facts hold under a key, the entries of an object as pairs; nothing where it is absent."""
    found = [facts(PAPER, case.get("file", "")).get(key, []) for case in cases(kind="json facts")]
    return [entry for part in found for entry in (part.items() if isinstance(part, dict) else part)]


def whole_facts(prefix: str) -> dict[str, Any]:
    """Return the JSON facts whose key begins with `prefix`, whole."""
    return {key: value for case in cases(kind="json facts") for key, value in facts(PAPER, case.get("file", "")).items()
            if key.startswith(prefix)}


def stated(case: dict[str, Any], word: str) -> str:
    """Return what a case's tolerance says of an array, "exact" where it says nothing."""
    said = case.get("tolerance", "exact")
    if isinstance(said, str):
        return said
    return next((text for key, text in said.items() if word in key.replace(",", " ").split()), "exact")


def bound(case: dict[str, Any], word: str) -> float:
    """Return the first number that a case's tolerance gives for an array, 0 where it gives none."""
    return next(iter(bounds(stated(case, word))), 0.0)


def largest(values: torch.Tensor | np.ndarray) -> float:
    """Return the largest magnitude, 0 of nothing."""
    return float(np.abs(np.asarray(values, np.float64)).max(initial=0))


def flag(arguments: list[str], name: str) -> str | None:
    """Return the value of a flag on a command line, given as --name=value or --name value; the last one counts."""
    found = None
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
        elif argument == name and place + 1 < len(arguments):
            found = arguments[place + 1]
    return found


def listed_state(file: str) -> list[list]:
    """Return [name, shape] of a network's tensors in their order."""
    found = facts(PAPER, file)
    return [list(entry) for entry in (found.items() if isinstance(found, dict) else found)]


def compare_norms(net: torch.nn.Module, file: str, relative: float) -> None:
    """Compare the norms of a network's gradients with a file's, but for those whose true gradient is zero."""
    norms = {name: norm for name, norm in facts(PAPER, file).items() if norm is not None}
    smallest = 1e-3 * np.median(list(norms.values())) if norms else 0
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    for name, norm in norms.items():
        if norm >= smallest:
            assert abs(gradients[name].norm().item() - norm) <= relative * norm, name
