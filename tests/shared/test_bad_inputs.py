"""Two hundred bad inputs over all scripts, made from their declarations: exit status 2, one line, nothing changed.

Every script is started as a user starts it, with one option at a time that is wrong: a value outside its bounds, a file
that is not there, is empty, damaged, a folder, or of another kind.
"""
from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.cli import Bool, Choice, Flag, Float, Int, IntList, Option, Text
from tests.shared.clean import script_process
from tests.shared.programs import ROOT, declared_options, environment
from tests.shared.test_options import CASES

pytestmark = pytest.mark.slow
SECONDS = 300
# Files that no option takes, by what is wrong with them.
BAD_FILES = ("absent.pth", "empty.pth", "noise.pth", "noise.pkl", "noise.zip", "noise.npz", "noise.npy", "noise.yaml",
             "folder", "void.zip", "latin.json")


def write_bad_files(folder: Path) -> None:
    folder.mkdir()
    (folder / "empty.pth").touch()
    for ending in ("pth", "pkl", "zip", "npz", "npy", "yaml"):
        (folder / f"noise.{ending}").write_bytes(b"PK\x03\x04" * (ending in ("pth", "zip", "npz")) + bytes(range(256)))
    (folder / "folder").mkdir()
    with zipfile.ZipFile(folder / "void.zip", "w"):
        pass
    (folder / "latin.json").write_bytes(b"{\xe4")


def wrong_values(option: Option) -> list[str]:
    """Return values that an option's type refuses."""
    kind = option.type
    if isinstance(kind, (Flag, Bool)):
        return ["perhaps"]
    if isinstance(kind, (Int, IntList)):
        return ["99999999999999999999", "x"]
    if isinstance(kind, Float):
        return [] if kind.non_finite else ["nan", "1e400"]
    return ["no-such-word"] if isinstance(kind, Choice) else []


def names_a_file(option: Option) -> bool:
    place = f"{option.metavar} {option.name} {option.help}".lower()
    return isinstance(option.type, Text) and any(word in place for word in (
        "file", "checkpoint", "folder", "dir", "path", "pkl", "zip", "yaml", "snapshot", "npz"))


def bad_commands(script: str, command: str) -> Iterator[list[str]]:
    """Yield words with one mistake each; what else is required is there by name only."""
    options = declared_options(script, command)
    required = {option.name: option for option in options if option.required}

    def words(wrong: Option, value: str) -> list[str]:
        others = [option for option in required.values() if option is not wrong]
        flags = [f"{option.name}={plausible(option)}" for option in others if option.is_flag]
        flags += [f"{wrong.name}={value}"] if wrong.is_flag else []
        places = [value if option is wrong else plausible(option) for option in options
                  if not option.is_flag and (option is wrong or option.required)]
        return [*command.split(), *flags, *places]

    typed = [option for option in options if wrong_values(option)]
    for option in typed[:: max(1, len(typed) // 2)][:2]:
        yield words(option, wrong_values(option)[0])
    files = [option for option in options if names_a_file(option) and not is_output(option)]
    for place, option in enumerate(files[:3]):
        for bad in (BAD_FILES[place], BAD_FILES[(3 + 5 * place + len(script)) % len(BAD_FILES)]):
            yield words(option, f"bad/{bad}")
    yield [*(words(options[0], plausible(options[0])) if options else []), "--no-such-flag"]


def is_output(option: Option) -> bool:
    return option.key.startswith(("out", "dest", "save", "json", "grid", "html", "data_dir", "cache")) or \
        option.key in ("prefix", "judge_dir", "list_path", "data_path")


def plausible(option: Option) -> str:
    if isinstance(option.type, Choice):
        return option.type.words[0]
    if isinstance(option.type, (Int, Float)):
        return "1"
    return "made" if is_output(option) else "bad/absent"


# Every third of them; BAD_INPUTS=1 in the environment tries all.
EVERY = int(os.environ.get("BAD_INPUTS", 3))
COMMANDS = [(script, words) for script, command in CASES for words in bad_commands(script, command)][::EVERY]


def state(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", range(8))
def test_each_ends_in_one_line_and_changes_nothing(part: int, tmp_path: Path) -> None:
    chosen = COMMANDS[part::8]

    def attempt(number: int) -> str:
        script, words = chosen[number]
        folder = tmp_path / str(number)
        folder.mkdir()
        write_bad_files(folder / "bad")
        before = state(folder)
        said = tmp_path / f"{number}.txt"
        around = environment(FEWLABEL_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        process = script_process(ROOT / script, words, folder, around, tmp_path / "stdout.txt", said)
        process.start()
        process.join(SECONDS)
        process.kill()
        complaint = said.read_text() if said.exists() else ""
        lines = [line for line in complaint.splitlines() if line.strip() and not line.startswith("warning:")]
        problems = []
        if process.exitcode != 2:
            problems.append(f"exit status {process.exitcode}")
        if len(lines) != 1 or not lines[0].startswith("error: "):
            problems.append(f"said {complaint[-1500:]!r}")
        if state(folder) != before:
            problems.append(f"left {sorted(set(state(folder)) ^ set(before))[:5]}")
        return f"{script} {' '.join(words)}: {'; '.join(problems)}" if problems else ""

    wrong = [problem for number in range(len(chosen)) if (problem := attempt(number))]
    assert not wrong, "\n".join(wrong)


def test_there_are_two_hundred_and_every_script_has_some() -> None:
    assert len(COMMANDS) * EVERY >= 500 and {script for script, _ in COMMANDS} == {script for script, _ in CASES}
