"""Every command of every README, and every command that the papers published, is understood: its script, its flags and
their values, its configuration files. Nothing is run."""
from __future__ import annotations

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from EDM.imagenet.experiment.config import parse as parse_with_config
from shared.cli import UserError, parse
from shared.report import tables
from tests.shared.programs import ROOT, declared_options, environment

PUBLISHED = Path(__file__).with_name("published_commands.txt")
READMES = sorted(path for depth in ("", "*/", "*/*/", "*/*/*/") for path in ROOT.glob(f"{depth}*.md")
                 if not path.relative_to(ROOT).parts[0].startswith("."))
MODULES_OF_OTHERS = {"pytorch_fid", "pip", "venv", "pytest"}
WITH_COMMANDS = ("EDM/fid.py",)


class Understood(Exception):
    """The command line has been read."""


def readme_commands(readme: Path) -> Iterator[tuple[str, str]]:
    """Yield (folder, command) of the bash blocks of a README; `cd` counts to the end of its block.

    A page of docs/ is typed from the root, and from one block to the next the folder stays.
    """
    in_docs, folder = "docs" in readme.parts, ROOT
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE):
        if block.startswith("#!"):
            continue  # a file of its own, which other tests run
        folder = folder if in_docs else readme.parent
        for place, value in (("\\\n", " "), ("$SEED", "1"), ("$photos", "my/photos"), ("$work", "my/work")):
            block = block.replace(place, value)
        for line in block.splitlines():
            words = shlex.split(line, comments=True) if re.match(r"[\w\"'./]", line) else []
            if words[:1] == ["cd"]:
                folder = (folder / words[1].rstrip(";")).resolve()
            elif words and is_command(words):
                yield str(folder.relative_to(ROOT)), line.strip()


def is_command(words: list[str]) -> bool:
    """Whether a line starts a program of ours or, by its looks, means to; the READMEs show output as well."""
    program = next((word for word in words if "=" not in word), "")
    return program in ("python", "python3", "bash", "torchrun", "accelerate") or program.endswith((".py", ".sh"))


def published_commands() -> Iterator[tuple[str, str]]:
    for line in PUBLISHED.read_text().splitlines():
        if line and not line.startswith("#"):
            folder, _, command = line.partition(" ")
            yield folder, command


def arguments_of(folder: Path, command: str) -> tuple[str, list[str]] | None:
    """Return (the file of the script, or its module; its arguments) of a command; None where it is nobody of ours."""
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    words = words[:next((i for i, word in enumerate(words) if word in (">", ">>", "|", "&&", "&")), len(words))]
    words[-1] = words[-1].rstrip(";")
    if words[0] in ("torchrun", "bash", "accelerate") or words[1:3] == ["-m", "torch.distributed.launch"]:
        at = next(i for i, word in enumerate(words) if i and word.endswith((".py", ".sh")))
    elif words[1] == "-m":
        if words[2].split(".")[0] in MODULES_OF_OTHERS:
            return None
        return words[2], words[3:]
    else:
        at = 1
    script = (folder / words[at]).resolve()
    assert script.is_file(), f"{command}: there is no {script.relative_to(ROOT)}"
    return str(script.relative_to(ROOT)), words[at + 1:]


def understand(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a script its arguments as far as it reads them; UserError where it does not know one."""
    if script.endswith(".sh"):
        understand_shell(script, arguments)
        return
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    read = getattr(module, "parse", None)
    if module.__name__.endswith(".tables"):  # they look up rows and columns
        monkeypatch.setattr(tables, "selected", partial(understood, tables.selected))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.delitem(sys.modules, module.__name__)
        with pytest.raises((Understood, SystemExit)) as ended:
            runpy.run_module(module.__name__, run_name="__main__")
        assert ended.type is Understood or ended.value.code == 0
    elif read is parse_with_config:
        read("", [option for option in declared_options(script) if option.name != "--config"], arguments)
    elif read in (None, parse):  # the script has no checks of its own beyond its declarations
        command = arguments.pop(0) if script in WITH_COMMANDS else ""
        parse("", declared_options(script, command), arguments)
    else:
        read(arguments)


def understood(original: Callable[..., Any], *given: Any) -> None:
    original(*given)
    raise Understood


def names_an_absent_file(error: UserError, arguments: list[str]) -> bool:
    """Whether a script has come as far as to look for the files that a README can only suppose."""
    paths = [word.rpartition("=")[2].rstrip("/") for word in arguments]
    return any("/" in path and path in str(error) and not Path(path).exists() for path in paths)


def understand_shell(script: str, arguments: list[str]) -> None:
    if script in ("run_all.sh", "run_tdsm.sh", "run_longtail.sh", "run_imagenet.sh"):
        dry = [*arguments, "--dry-run"]
        done = subprocess.run(["bash", ROOT / script, *dry], text=True, capture_output=True, env=environment())
        if done.returncode:
            raise UserError(done.stderr)
    elif script == "EDM/generate.sh":
        if "..." not in arguments:
            assert len(arguments) == 4 and arguments[0].isdigit() and arguments[3].isdigit()
    else:
        assert script in ("tests/run.sh", "docs/results/build.sh")


COMMANDS = [*dict.fromkeys([*published_commands(), *(pair for path in READMES for pair in readme_commands(path))])]


@pytest.mark.parametrize(("folder", "command"), COMMANDS, ids=[f"{f}: {c}"[:120] for f, c in COMMANDS])
def test_it_is_understood(folder: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setenv("LOCAL_RANK", "0")  # scripts set it where a launcher passes a flag
    found = arguments_of(ROOT / folder, command)
    if found is None:
        return
    script, arguments = found
    for word in arguments:
        if word.endswith(".yaml"):
            assert Path(word.rpartition("=")[2]).is_file(), f"there is no {word} in {folder}"
    shortened = "..." in arguments
    try:
        understand(script, [word for word in arguments if word != "..."] if shortened else arguments, monkeypatch)
    except UserError as error:
        lacks = "required" in str(error) or "Missing" in str(error)
        if not (shortened and lacks) and not names_an_absent_file(error, arguments):
            raise


def test_every_readme_has_commands() -> None:
    """So that a change of their form does not leave this file with nothing to do."""
    with_commands = {path.parent.name for path in READMES if list(readme_commands(path))}
    assert with_commands >= {ROOT.name, "TorchSSL", "EDM", "DDAE", "MetaSemi", "DASO"}
    assert {folder.split("/")[0] for folder, _ in published_commands()} == {"TorchSSL", "EDM", "DDAE", "MetaSemi",
                                                                           "DASO"}
