"""DDAE/README.md: its commands are understood by their scripts, the flags and files that it names exist."""
from __future__ import annotations

import importlib
import re
import shlex

import pytest

from shared.cli import Parser, UserError
from tests.shared.programs import ROOT

TEXT = (ROOT / "DDAE/README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
SCRIPTS = ("train", "sample", "fid", "linear", "contrastive", "noisy_classifier_WRN", "noisy_classifier_DDAE",
           "finetune", "extract_cifar10_pngs", "DiT.vae_preprocessing", "DiT.linear")


def commands() -> list[tuple[str, list[str]]]:
    """Return (script, arguments) of every command in the README that starts a script of this folder."""
    found = []
    for block in BLOCKS:
        folder = ""
        for line in block.replace("\\\n", " ").splitlines():
            line = line.partition("#")[0]
            folder = "DiT." if line.startswith("cd DiT") else folder
            match = re.search(r"(?:^|\s)(\w+)\.py(.*)", line)
            if match and "../" not in line.partition(".py")[0]:
                found.append((folder + match[1], shlex.split(match[2])))
    return found


def test_the_readme_has_commands_of_every_script() -> None:
    assert {script for script, _ in commands()} == set(SCRIPTS)


@pytest.mark.parametrize("script, arguments", commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_are_understood(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module(f"DDAE.{script}").parse(arguments)
    for argument in arguments:
        if argument.startswith("config/"):
            assert (ROOT / "DDAE" / argument).is_file()


def test_flags_in_the_text_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"--help", "--jobs", "--scale"}     # of every script, and of the tables

    def note(parser: Parser, *_: object) -> None:
        known.update(flag for action in parser._actions for flag in action.option_strings)
        raise UserError("noted")

    monkeypatch.setattr(Parser, "parse_args", note)
    for script in SCRIPTS:
        with pytest.raises(UserError, match="noted"):
            importlib.import_module(f"DDAE.{script}").parse([])
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", prose)) <= known
