"""Two processes with half a batch each are one process with the whole batch.

In double precision: on batches of eight, an update multiplies what rounding leaves by ten and more.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.daso.small import LEARNERS, command, saved
from tests.shared.programs import run

DASO = ("fixmatch_daso", {"ALGORITHM.ABC.APPLY": True, "MODEL.LOSS.WITH_LABELED_COST_SENSITIVE": True,
                          "MODEL.LOSS.WARMUP_ITERS": 2, "MODEL.LOSS.COST_SENSITIVE.LOSS_OVERRIDE": "LDAM"})
STEPS = {"SOLVER.MAX_ITER": 4, "PERIODS.EVAL": 4, "PERIODS.LOG": 4}


def compare(config: str, keys: dict[str, Any], folder: Path) -> None:
    """Run both ways and compare states, averages and losses."""
    found = []
    for name, ranks in ("one", 1), ("two", 2):
        run("tests/daso/double_main.py", *command(config, folder / name, keys), ranks=ranks)
        found += [path for path in (folder / name).iterdir() if path.is_dir()]
    one, two = found
    ours, theirs = saved(one), saved(two)
    assert_near(ours["algorithm"], theirs["algorithm"], "algorithm")
    for part in ("model", "ema_model"):
        assert_near(ours[part], theirs[part], part)
    for a, b in zip(*([json.loads(line) for line in (path / "metrics.json").read_text().splitlines()]
                      for path in (one, two)), strict=True):
        for name in a:
            if "loss" in name or name.startswith(("imb_factors", "main_pl")):
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), name


def assert_near(a: Any, b: Any, path: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_near(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=lambda m: f"{path}: {m}")
    else:
        assert a == b, path


def test_daso(tmp_path: Path) -> None:
    compare(DASO[0], {**DASO[1], **STEPS}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_rival(name: str, tmp_path: Path) -> None:
    config, keys = LEARNERS[name]
    compare(config, {**keys, **STEPS}, tmp_path)
