"""Learning rates, ramp-ups, and the exponent of CReST's alignment."""
from __future__ import annotations

import re
from typing import Any

import numpy as np

from DASO.lib.algorithm.crest import alignment_exponent
from DASO.lib.algorithm.interface import ramp_up
from DASO.lib.config.config import Config
from DASO.lib.solver import learning_rate
from tests.golden.daso_cases import each, of_file, serves, stored, tolerance

CASES = of_file("schedules.npz")
RATES = [case for case in CASES if case["name"] == "lr"]
RAMPS = [case for case in CASES if case["name"] == "ramp"]
SERVES = serves(RATES + RAMPS)


@each(RATES)
def test_learning_rate(case: dict[str, Any]) -> None:
    wanted = stored(case)
    for name, given in case["configs"].items():
        given = dict(given)
        length = given.pop("override_max_iter")
        cfg = Config(given)
        found = [learning_rate(cfg, int(it), length) for it in wanted["iters"]]
        np.testing.assert_allclose(found, wanted[name], rtol=tolerance(case)["rtol"], atol=1e-12, err_msg=name)
    assert wanted.keys() <= {"iters", *case["configs"]}


@each(RAMPS)
def test_ramp_up(case: dict[str, Any]) -> None:
    wanted, what = stored(case), case["what"]
    total, period = int(re.search(r"MAX_ITER (\d+)", what)[1]), int(re.search(r"every (\d+)", what)[1])
    smallest = float(re.search(r"TMIN ([\d.]+)", what)[1])
    for key, value in wanted.items():
        if key == "iters":
            continue
        if key == "crest_temperature":
            found = [alignment_exponent(int(it) // period + 1, total // period, smallest) for it in wanted["iters"]]
        else:
            schedule, ratio = key.removeprefix("crest_").split("_")
            restarts = key.startswith("crest_")
            found = [ramp_up(int(it) % period if restarts else int(it), period if restarts else total, float(ratio),
                             schedule) for it in wanted["iters"]]
        np.testing.assert_allclose(found, value, **tolerance(case), err_msg=key)
