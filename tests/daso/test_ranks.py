"""Two processes with half a batch each are one process with the whole batch; in double precision."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.daso.small import LEARNERS, command, saved
from tests.shared.programs import run

PROGRAM = "tests/daso/ranks_program.py"
DASO = {"ALGORITHM.ABC.APPLY": True, "MODEL.LOSS.WITH_LABELED_COST_SENSITIVE": True, "MODEL.LOSS.WARMUP_ITERS": 2,
        "MODEL.LOSS.COST_SENSITIVE.LOSS_OVERRIDE": "LDAM", "SOLVER.MAX_ITER": 4, "PERIODS.EVAL": 4, "PERIODS.LOG": 4}


def test_a_whole_run_of_daso(tmp_path: Path) -> None:
    """States, averages, losses and statistics are the same."""
    found = []
    for name, ranks in ("one", 1), ("two", 2):
        run(PROGRAM, *command("fixmatch_daso", tmp_path / name, DASO), ranks=ranks)
        found += [path for path in (tmp_path / name).iterdir() if path.is_dir()]
    ours, theirs = map(saved, found)
    for part in ("algorithm", "model", "ema_model"):
        torch.testing.assert_close(theirs[part], ours[part], rtol=1e-4, atol=1e-5)
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in found)
    compared = [name for name in a if "loss" in name or name.startswith(("imb_factors", "main_pl"))]
    assert len(compared) > 20
    assert {name: b[name] for name in compared} == pytest.approx({name: a[name] for name in compared}, rel=1e-5,
                                                                 abs=1e-5)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    files = [tmp_path_factory.mktemp("ranks") / name for name in ("one.pt", "two.pt")]
    for ranks, file in enumerate(files, 1):
        run(PROGRAM, file, ranks=ranks)
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("name", LEARNERS)
def test_steps_of_every_rival(name: str, one_and_two: list[dict[str, Any]]) -> None:
    one, two = one_and_two
    torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
