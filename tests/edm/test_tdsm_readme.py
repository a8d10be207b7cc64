"""EDM/TDSM.md: its commands and flags exist."""
from __future__ import annotations

import importlib
import re
import shlex

import pytest

from tests.shared.programs import ROOT, help_flags

TEXT = (ROOT / "EDM/TDSM.md").read_text()
SCRIPTS = ("dataset_tool", "train_classifier", "train_noise", "train", "generate", "evaluate")


def commands() -> list[tuple[str, list[str]]]:
    """Return (script, arguments) of every command of SCRIPTS."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        match = re.search(rf"\s({'|'.join(SCRIPTS)})\.py (.*)", line.partition(" #")[0])
        if match and not line.startswith("#"):
            found.append((match[1], shlex.split(match[2])))
    return found


def test_there_are_commands_of_every_script() -> None:
    assert {script for script, _ in commands()} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_named_after_a_script_are_its_flags(script: str) -> None:
    known = help_flags(importlib.import_module(f"EDM.{script}").main)
    named = re.findall(rf"`{script}\.py (--[\w-]+)", TEXT)
    assert set(named) <= known
