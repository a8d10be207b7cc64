"""Access to the golden numbers: folders of `index.json` and arrays, one a paper.

`GOLDEN_DIR` names the folder that holds `edm/`, `torchssl/` and `fill.py`; by default the one beside this file. Tests
build every case from the fields of the index, so that another folder of the same form must pass as well.
"""
from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


def golden_root() -> Path:
    return Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent)


def golden_dir(paper: str) -> Path:
    return golden_root() / paper


@functools.cache
def index(paper: str) -> dict[str, Any]:
    """Return the paper's index.json."""
    return json.loads((golden_dir(paper) / "index.json").read_text())


@functools.cache
def facts(paper: str, file: str) -> Any:
    """Return another JSON file of the paper's folder."""
    return json.loads((golden_dir(paper) / file).read_text())


@functools.cache
def arrays(paper: str, file: str) -> dict[str, np.ndarray]:
    """Return all arrays of one npz file of the paper's folder."""
    with np.load(golden_dir(paper) / file) as archive:
        return {name: archive[name] for name in archive.files}


@functools.cache
def _fill_module() -> ModuleType:
    # It stands beside the fixtures, inside the project or not, so it is loaded by its path.
    spec = importlib.util.spec_from_file_location("golden_fill", golden_root() / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(net: torch.nn.Module) -> torch.nn.Module:
    """Overwrite every parameter and batch-norm statistic by values that depend on name and shape only."""
    return _fill_module().fill(net)
