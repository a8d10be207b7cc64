"""The published configuration files: every key and value, in their order."""
from __future__ import annotations

import pytest

from tests.golden.cases import facts, golden_dir
from TorchSSL.make_configs import CONFIG

SERVES: set[str] = set()
FILES = facts("torchssl", "configs.json") if (golden_dir("torchssl") / "configs.json").exists() else {}


@pytest.mark.parametrize("name", FILES)
def test_published_configuration(name: str) -> None:
    lines = (CONFIG / name.removeprefix("(DPT) ")).read_text(encoding="utf-8").splitlines()
    assert [line.split(": ", 1) for line in lines] == FILES[name]
