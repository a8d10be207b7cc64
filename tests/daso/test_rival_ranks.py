"""Two processes with half a batch each compute what one with the whole batch does, for every rival of DASO."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.distributed import World
from tests.daso import ranks_program
from tests.daso.small import LEARNERS
from tests.shared.programs import run


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    file = tmp_path_factory.mktemp("ranks") / "two.pt"
    run("tests/daso/ranks_program.py", file, ranks=2)
    return ranks_program.results(World()), torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", LEARNERS)
def test_two_ranks_are_one(name: str, one_and_two: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = one_and_two[0][name], one_and_two[1][name]
    torch.testing.assert_close(two, one, rtol=2e-3, atol=2e-4)
