"""Every option of every script: what lies outside its declaration ends in one line that names it."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from DASO.lib.config.config import KEYS as DASO_KEYS
from DDAE.ddae.config import DIFFUSION_KEYS
from DDAE.ddae.config import KEYS as DDAE_KEYS
from shared.cli import Bool, Choice, Float, Int, IntList, IntTuple, Option, Text, UserError, parse, read_value
from tests.shared.programs import ROOT, declared_options, one_line_error, run

SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in ("DASO", "DDAE", "EDM", "MetaSemi", "TorchSSL", "shared")
                 for path in (ROOT / folder).rglob("*.py") if '\nif __name__ == "__main__":' in path.read_text())
COMMANDS = {"EDM/fid.py": ("calc", "ref")}
CASES = [(script, command) for script in SCRIPTS for command in COMMANDS.get(script, ("",))]
VALUES = ("nan", "inf", "-inf", "-1", "0", "1e400", "99999999999999999999", "", "word")


def is_inside(kind: Any, value: Any) -> bool:
    """Whether a value that was accepted is one of the declared type, between its bounds."""
    if type(kind) is Int:
        bounds = kind.low is None or value >= kind.low, kind.high is None or value <= kind.high
        return type(value) is int and all(bounds) and -2**63 <= value < 2**63
    if type(kind) is Float:
        bounds = (kind.low is None or value > kind.low or value == kind.low and "low" not in kind.open,
                  kind.high is None or value < kind.high or value == kind.high and "high" not in kind.open)
        return type(value) is float and all(bounds) and (kind.non_finite or math.isfinite(value))
    if isinstance(kind, IntList):
        return isinstance(value, tuple if isinstance(kind, IntTuple) else list) and all(
            is_inside(kind.member, number) for number in value)
    if isinstance(kind, Choice):
        return value in (*kind.words, *kind.further)
    return isinstance(value, bool if isinstance(kind, Bool) else str if isinstance(kind, Text) else object)


def values_of(option: Option, value: Any) -> Iterator[Any]:
    yield from value if option.many else [value]


@pytest.mark.parametrize("script, command", CASES, ids=[f"{s} {c}".strip() for s, c in CASES])
def test_values_outside_are_refused(script: str, command: str) -> None:
    for option in declared_options(script, command):
        alone = replace(option, required=False)
        for text in VALUES:
            words = [f"{option.name}={text}"] if option.is_flag else [text]
            try:
                found = getattr(parse("", (alone,), words), option.key)
            except UserError as error:
                assert f"'{option.name}'" in str(error) and "\n" not in str(error)
                continue
            assert all(is_inside(option.type, value) for value in values_of(option, found)), (option.name, text)


@pytest.mark.parametrize("script, command", CASES, ids=[f"{s} {c}".strip() for s, c in CASES])
def test_defaults_lie_inside(script: str, command: str) -> None:
    for option in declared_options(script, command):
        if isinstance(option.default, (bool, int, float, str)):
            assert is_inside(option.type, option.type.convert(str(option.default))), option.name


@pytest.mark.parametrize("script, command", CASES, ids=[f"{s} {c}".strip() for s, c in CASES])
def test_help_names_every_option(script: str, command: str, capsys: pytest.CaptureFixture) -> None:
    options = declared_options(script, command)
    with pytest.raises(SystemExit) as left:
        parse("Doc.", options, ["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert all((option.name if option.is_flag else option.placeholder) in text for option in options
               if not option.hidden)
    assert "mps" not in {word.strip(".,;()") for option in declared_options(script, command)
                         for word in (option.help or "").split()}  # no step was ever tried on it


@pytest.mark.parametrize("option", [*DASO_KEYS.values(), *DDAE_KEYS, *DIFFUSION_KEYS["DDPM"], *DIFFUSION_KEYS["EDM"]],
                         ids=lambda option: option.key)
def test_values_of_keys_outside_are_refused(option: Option) -> None:
    for text in VALUES:
        try:
            found = read_value(option, text, "file.yaml")
        except UserError as error:
            assert str(error).startswith(f"file.yaml: {option.key}: ") and "\n" not in str(error)
            continue
        assert all(is_inside(option.type, value) for value in values_of(option, found)), text


@pytest.mark.parametrize("script, command", CASES, ids=[f"{s} {c}".strip() for s, c in CASES])
def test_a_script_ends_in_one_line_and_writes_nothing(script: str, command: str, tmp_path: Path) -> None:
    options = declared_options(script, command)
    positional = ["x" for option in options if not option.is_flag and option.required]
    numbers = [option.name for option in options if option.is_flag and isinstance(option.type, Int)]
    flag = f"{numbers[0]}=99999999999999999999" if numbers else "--no-such-flag"
    line = one_line_error(run(script, *command.split(), *positional, flag, cwd=tmp_path, status=2))
    assert flag.partition("=")[0] in line
    assert not list(tmp_path.iterdir())
