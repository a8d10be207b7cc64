"""The published configuration files: every key and value, in their order."""
from __future__ import annotations

import pytest

from tests.golden.cases import facts
from tests.golden.torchssl_cases import PAPER
from TorchSSL.make_configs import CONFIG

SERVES: set[tuple[str, str]] = set()


@pytest.mark.parametrize("name", facts(PAPER, "configs.json"))
def test_published_configuration(name: str) -> None:
    lines = (CONFIG / name.removeprefix("(DPT) ")).read_text(encoding="utf-8").splitlines()
    assert [line.split(": ", 1) for line in lines] == facts(PAPER, "configs.json")[name]
