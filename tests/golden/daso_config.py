"""Configuration: defaults, the published files, and the names of experiments. (daso_config_*: one file each.)"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import DASO
from DASO.lib.algorithm import ALGORITHMS
from DASO.lib.config.config import Config, check, experiment_name, read_yaml
from DASO.lib.config.defaults import DEFAULTS, PUBLISHED
from tests.golden.cases import facts

SERVES: set[tuple[str, str]] = set()
CONFIGS = Path(DASO.__file__).parent / "configs"
# Published mistakes that would not run, or run something else, and what they are here.
MENDED = {("cifar10/remixmatch_daso.yaml", "MODEL.NUM_CLASSES", 100): 10,
          ("stl10/remixmatch_crest.yaml", "ALGORITHM.NAME", "ReMixMatch"): "ReMixMatchCReST"}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_defaults() -> None:
    published = facts("daso", "config_defaults.json")
    assert {key: plain(DEFAULTS.get(key)) for key in published} == published
    assert published.keys() <= {option.key for option in PUBLISHED}


@pytest.mark.parametrize("name", facts("daso", "config_files.json"))
def test_file(name: str) -> None:
    published = facts("daso", "config_files.json")[name]
    wanted = {key: MENDED.get((name, key, value) if not isinstance(value, list) else None, value)
              for key, value in published.items()}
    found = read_yaml(CONFIGS / name)
    assert {key: plain(value) for key, value in found.items()} == wanted
    cfg = Config(found)
    check(cfg)
    assert cfg.ALGORITHM.NAME in ALGORITHMS


@pytest.mark.parametrize("case", facts("daso", "experiment_names.json"), ids=lambda case: case["name"])
def test_experiment_name(case: dict[str, Any]) -> None:
    pairs = case["overrides"]
    values = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert experiment_name(Config(values), case["seed"]) == case["name"]
