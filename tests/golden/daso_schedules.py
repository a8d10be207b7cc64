"""Learning rates, ramp-ups, and the exponent of CReST's alignment."""
from __future__ import annotations

import numpy as np

from DASO.lib.algorithm.crest import alignment_exponent
from DASO.lib.algorithm.interface import ramp_up
from DASO.lib.config.config import Config
from DASO.lib.solver import learning_rate
from tests.golden.cases import each, number, serves, tolerance, whole
from tests.golden.daso_cases import Case, cases_of, close, stored

RATES, RAMPS = cases_of("learning rates"), cases_of("ramps")
SERVES = serves(RATES, RAMPS)


@each(RATES)
def test_learning_rate(case: Case) -> None:
    wanted = stored(case)
    for name, given in case["configs"].items():
        given = dict(given)
        length = given.pop("override_max_iter", None)
        cfg = Config(given)
        found = [learning_rate(cfg, int(it), length) for it in wanted["iters"]]
        if name in wanted:
            relative = tolerance(case["tolerance"])["rtol"]
            np.testing.assert_allclose(found, wanted[name], rtol=relative, atol=1e-12, err_msg=name)
    assert wanted.keys() <= {"iters", *case["configs"]}


@each(RAMPS)
def test_ramp_up(case: Case) -> None:
    wanted, what = stored(case), case["what"]
    total, period, smallest = whole(what, r"MAX_ITER\W*#"), whole(what, "every #", 0), number(what, r"TMIN\W*#", 0)
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
        close(found, value, case, key)
