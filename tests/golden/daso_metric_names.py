"""The names in metrics.json, of every learner."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import DASO
from DASO.lib.config.config import Config, read_yaml
from DASO.lib.trainer import train
from shared.distributed import World
from tests.golden.cases import facts

SERVES: set[tuple[str, str]] = set()
CONFIGS = Path(DASO.__file__).parent / "configs" / "digits"
NAMES = facts("daso", "metric_names.json")
# A run of two iterations in which every class is drawn and every part of a learner is at work.
SHORT = {"SEED": 0, "GPU_ID": -1, "SOLVER.MAX_ITER": 2, "PERIODS.EVAL": 2, "PERIODS.LOG": 2, "PERIODS.CHECKPOINT": 100,
         "SOLVER.IMS_PER_BATCH": 96, "SOLVER.UNLABELED_BATCH_RATIO": 1, "DATASET.SAMPLER_NAME": "ClassAwareSampler",
         "DATASET.SAMPLER_BETA": 1.0, "ALGORITHM.DASO.PRETRAIN_STEPS": 0, "ALGORITHM.CREST.GEN_PERIOD_STEPS": 2,
         "ALGORITHM.USADTM.PRETRAIN_STEPS": 1, "TENSORBOARD": False, "EVAL_BATCH": 1000}


def settings(learner: str) -> dict[str, object]:
    """Return the configuration of a learner on the digits; "DASO+ABC" is DASO with the balanced classifier."""
    name, _, extra = learner.partition("+")
    file, *_ = (path for path in sorted(CONFIGS.iterdir()) if read_yaml(path)["ALGORITHM.NAME"] == name)
    return {**read_yaml(file), **({"ALGORITHM.ABC.APPLY": True} if extra == "ABC" else {}), **SHORT}


@pytest.mark.parametrize("learner", NAMES)
def test_metric_names(learner: str, tmp_path: Path) -> None:
    train(Config(settings(learner)), tmp_path, World())
    line = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert list(line) == sorted(line)
    found = {re.sub(r"/(logit_adjusted_)?\d+$", r"/\1{c}", name) for name in line}
    if learner == "DARP_ESTIM":  # the published one evaluates by itself and leaves out the usual numbers
        found &= set(NAMES[learner])
    assert sorted(found) == sorted(NAMES[learner])
