"""What a training step costs on a GPU, measured without one: no wait, and no more launches or memory than before.

Budgets are what was measured (budgets.json, written by `python -m tests.gpu.measure --write`) plus 5 %.
"""
from __future__ import annotations

import json

import pytest

from tests.gpu.measure import BUDGETS, Cost, measure, unavailable
from tests.gpu.programs import PROGRAMS, with_wait

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"the null GPU is left out: {unavailable()}")
SPARE = 1.05
QUICK = [name for name, program in PROGRAMS.items() if not program.slow]
SLOW = [name for name, program in PROGRAMS.items() if program.slow]
SPOILT = "freematch with one .item()"


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def quick(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cost]:
    programs = {name: PROGRAMS[name] for name in QUICK} | {SPOILT: with_wait(PROGRAMS["freematch"])}
    return measure(programs, ranks, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cost]:
    return measure({name: PROGRAMS[name] for name in SLOW}, ranks, tmp_path_factory.mktemp("slow"))


def check(name: str, cost: Cost, ranks: int) -> None:
    budget = json.loads(BUDGETS.read_text())[name][str(ranks)]
    assert cost.error is None
    assert cost.waits <= PROGRAMS[name].waits, cost.where
    assert cost.mistakes == ()
    assert cost.launches <= SPARE * budget["launches"]
    assert cost.peak <= SPARE * budget["peak"]


@pytest.mark.parametrize("name", QUICK)
def test_a_step(name: str, quick: dict[str, Cost], ranks: int) -> None:
    check(name, quick[name], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_step_of_the_others(name: str, slow: dict[str, Cost], ranks: int) -> None:
    check(name, slow[name], ranks)


def test_one_added_wait_is_found(quick: dict[str, Cost], ranks: int) -> None:
    assert quick[SPOILT].waits == 1
    assert any("train_step" in line for line in quick[SPOILT].where)
