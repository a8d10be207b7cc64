"""Access to the golden numbers: a folder for each paper, which holds `index.json`, other JSON files and arrays.

`GOLDEN_DIR` names the folder that holds `edm/`, `torchssl/` and `fill.py`; by default the one beside this file. Tests
build every case from the fields of the index, so that another folder of the same form must pass as well. A file or a
key that such a folder lacks is a case less: modules find nothing to list, and a test that asks for it is skipped.
"""
from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = os.environ.get("GOLDEN_DEVICE", "cpu")  # where networks and losses are computed
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"


# ------------------------------------------------------------------------------------------------------------- files

class Stored(dict):
    """What a file holds, key -> value. A test that asks for a key which is not there is skipped."""

    def __init__(self, file: str, content: Iterable = ()) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        pytest.skip(f"{self.file} has no {key!r}")


def golden_root() -> Path:
    return Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent)


def golden_dir(paper: str) -> Path:
    if not golden_root().is_dir():
        raise FileNotFoundError(f"GOLDEN_DIR: there is no folder {golden_root()}")
    return golden_root() / paper


@functools.cache
def facts(paper: str, file: str) -> Any:
    """Return a JSON file of the paper's folder: an object as `Stored`, which is empty where there is no such file."""
    path = golden_dir(paper) / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    return Stored(f"{paper}/{file}", content) if isinstance(content, dict) else content


def index(paper: str) -> Stored:
    """Return the paper's index.json."""
    return facts(paper, "index.json")


@functools.cache
def arrays(paper: str, file: str) -> Stored:
    """Return all arrays of one npz file of the paper's folder, none where there is no such file."""
    path = golden_dir(paper) / file
    if not path.is_file():
        return Stored(f"{paper}/{file}")
    with np.load(path) as archive:
        return Stored(f"{paper}/{file}", {name: archive[name] for name in archive.files})


# ------------------------------------------------------------------------------------------------------------- cases

def cases(paper: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the cases of the index that have these values in these fields, as `Stored`."""
    return [Stored(f"{paper}: {name_of(case)}", case) for case in index(paper).get("cases", ())
            if all(case.get(name) == value for name, value in fields.items())]


def name_of(case: dict[str, Any]) -> str:
    """Return the name of a case, which papers keep in different fields; without one it is its file's."""
    return next((case[field] for field in ("case", "id", "name", "file") if field in case), "without a name")


def keys_of(case: dict[str, Any]) -> dict[str, str]:
    """Return the arrays that a case lists: name of the array within the case -> its key in the file.

    The index lists whole keys, whose first part is that of the case, or names with keys, or names with shapes.
    """
    listed = next((case[field] for field in ("output_keys", "keys", "arrays") if field in case), [])
    if not isinstance(listed, dict):
        return {key.partition("/")[2]: key for key in listed}
    separator = "." if "case" in case else "/"
    return {name: key if isinstance(key, str) else f"{name_of(case)}{separator}{name}" for name, key in listed.items()}


def stored(paper: str, case: dict[str, Any]) -> Stored:
    """Return the arrays that a case lists, by their names within the case; those that the file lacks are left out.

    Skips the test where all of them are lacking, as it would compare nothing.
    """
    found, listed = arrays(paper, case["file"]), keys_of(case)
    present = {name: found[key] for name, key in listed.items() if key in found}
    if listed and not present:
        pytest.skip(f"{found.file} has no arrays of {name_of(case)}")
    return Stored(f"{found.file}: {name_of(case)}", present)


def tensors(paper: str, case: dict[str, Any]) -> Stored:
    """Return copies of the arrays that a case lists, as tensors."""
    found = stored(paper, case)
    return Stored(found.file, {name: torch.from_numpy(np.array(value)).to(DEVICE)
                                for name, value in found.items()})


def each(found: Sequence[dict[str, Any]]) -> pytest.MarkDecorator:
    """Run a test once for each case, as its argument `case`."""
    return pytest.mark.parametrize("case", found, ids=name_of)


# ----------------------------------------------------------------------------------------------- what tests serve

def serves(*groups: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return what identifies cases, (file, name), as two files may have cases of one name."""
    return {(case.get("file", ""), name_of(case)) for group in groups for case in group}


def unserved(paper: str, areas: Iterable[ModuleType]) -> list[tuple[str, str]]:
    """Return the cases of the index that no area has in its SERVES."""
    return sorted(serves(cases(paper)).difference(*(getattr(area, "SERVES", set()) for area in areas)))


def hidden(areas: Sequence[ModuleType]) -> list[str]:
    """Return the names of tests and fixtures that stand for something in another area too: one of them would be lost
    where all are imported."""
    wanted = {name for area in areas for name, value in vars(area).items()
              if name.startswith("test_") or type(value) is type(_a_fixture)}
    return sorted(name for name in wanted if sum(name in vars(area) for area in areas) > 1)


@pytest.fixture
def _a_fixture() -> None:
    """What fixtures are to Python."""


# ------------------------------------------------------------------------------------------- what a case says in words

def number(text: str, pattern: str, default: float | None = None) -> float:
    """Return the number at "#" in the first match of `pattern`; raises LookupError without match and default."""
    found = re.search(pattern.replace("#", NUMBER).replace(" ", r"\s*"), text, re.IGNORECASE)
    if found is not None:
        return float(found[1])
    if default is None:
        raise LookupError(f"{text!r} says nothing like {pattern!r}")
    return default


def whole(text: str, pattern: str, default: int | None = None) -> int:
    return int(number(text, pattern, default))


def numbers(text: str) -> list[int]:
    """Return the integers of a text in their order."""
    return [int(found) for found in re.findall(r"\d+", text)]


def bounds(text: str | float) -> list[float]:
    """Return the bounds in the words of a tolerance, in their order: numbers with an exponent or a decimal point."""
    return [float(found) for found in re.findall(r"(?<![\w.])\d+(?:\.\d+)?e-?\d+|(?<![\w.])0\.\d+", str(text))]


def tolerance(text: str | float) -> dict[str, float]:
    """Return a tolerance as assert_allclose takes it.

    "rtol R, atol A"; "A abs or R rel"; "R relative"; "exact"; a single number counts both ways.
    """
    text = str(text)
    found = {kind: float(value) for kind, value in re.findall(rf"\b(rtol|atol)\W*{NUMBER}", text)}
    for kind, word in (("rtol", "rel"), ("atol", "abs")):
        if (named := re.search(rf"{NUMBER} {word}|{word}\w* {NUMBER}", text)) and kind not in found:
            found[kind] = float(named[1] or named[2])
    if not found and not text.startswith("exact"):
        single = float(re.search(NUMBER, text)[0])
        found = {"rtol": single, "atol": single}
    return {"rtol": 0.0, "atol": 0.0, **found}


# ----------------------------------------------------------------------------------------------------------- weights

@functools.cache
def _fill_module() -> ModuleType:
    # It stands beside the fixtures, inside the project or not, so it is loaded by its path.
    path = golden_root() / "fill.py"
    path = path if path.is_file() else Path(__file__).parent / "fill.py"
    spec = importlib.util.spec_from_file_location("golden_fill", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(net: torch.nn.Module) -> torch.nn.Module:
    """Overwrite every parameter and batch-norm statistic by values that depend on name and shape only; the network is
    then on the device of the tests."""
    return _fill_module().fill(net).to(DEVICE)


def fill_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values that `fill` gives a tensor of this name and shape, float32."""
    return _fill_module().value(name, shape)
