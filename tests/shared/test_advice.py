"""Messages give advice that works: shared code names no flag that a script may lack, and the remedies can be typed."""
from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import cli
from shared.cli import UserError
from shared.data.datasets import load_dataset
from tests.shared.programs import ROOT, declared_options
from tests.shared.test_options import CASES
from TorchSSL import check_data

# Flags that messages of shared code may name: every script that comes to the message has them.
ALLOWED = {
    "shared/cli.py": {"--help"},
    "shared/report/tables.py": {"--out", "--slurm", "--run", "--only"},  # all tables are this program
    "shared/training/record.py": {"--overwrite"},                        # of every program that keeps a record
    "shared/training/run.py": {"--overwrite"},                           # named only where the program has it
    "shared/data/photographs.py": {"--skip-bad"},                        # named only where the program has it
    "shared/networks.py": {"--pretrained", "--net", "--freeze"},         # replaced by DASO, which has keys
}


def messages(path: Path) -> Iterator[str]:
    """Yield the constant parts of the errors and warnings of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) or isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warn":
            yield "".join(part.value for part in ast.walk(node)
                          if isinstance(part, ast.Constant) and isinstance(part.value, str))


def test_shared_code_names_no_flag_of_its_own() -> None:
    for path in (ROOT / "shared").rglob("*.py"):
        name = str(path.relative_to(ROOT))
        for text in messages(path):
            if re.search(r"\w+\.py --", text):
                continue  # a command with its script, see below
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
            assert named <= ALLOWED.get(name, set()), (name, text)


def test_scripts_that_keep_a_record_or_a_run_have_the_way_on() -> None:
    for script, command in CASES:
        text = (ROOT / script).read_text()
        if "Record(" in text and "overwrite" in text:
            assert "--overwrite" in {option.name for option in declared_options(script, command)} or command == "calc"


@pytest.mark.parametrize("script", ["EDM/train.py", "EDM/train_noise.py", "EDM/train_classifier.py", "DDAE/train.py",
                                    "EDM/imagenet/train_ldm.py", "DDAE/noisy_classifier_WRN.py", "DASO/main.py",
                                    "MetaSemi/train_meta.py",
                                    "MetaSemi/train_baseline.py", "MetaSemi/train_imagenet.py",
                                    "MetaSemi/train_meta_imagenet.py", "TorchSSL/freematch.py"])
def test_every_trainer_has_the_way_on(script: str) -> None:
    assert "--overwrite" in {option.name for option in declared_options(script)}


def test_a_data_set_that_is_not_there_names_the_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check_data.py") as found:
        load_dataset("cifar10", "train", tmp_path)
    _, *words = shlex.split(str(found.value).partition("fetch it with ")[2])
    options = cli.parse("", check_data.FLAGS, words)
    assert (options.dataset, options.data_dir, options.download) == ("cifar10", str(tmp_path), True)
