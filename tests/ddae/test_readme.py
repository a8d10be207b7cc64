"""DDAE/README.md: it has commands of every script, and its flags exist."""
from __future__ import annotations

import importlib
import re
import shlex

from shared.report import tables
from tests.shared.programs import ROOT, help_flags

TEXT = (ROOT / "DDAE/README.md").read_text()
SCRIPTS = ("train", "sample", "fid", "extract_cifar10_pngs", "linear", "contrastive", "noisy_classifier_WRN",
           "noisy_classifier_DDAE", "finetune", "DiT.vae_preprocessing", "DiT.linear")


def commands() -> list[tuple[str, list[str]]]:
    """Return (script, arguments) of every command of this folder's scripts in the README."""
    found, folder = [], ""
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        folder = "DiT." if "vae_preprocessing.py" in block else ""
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:python|torchrun)\b[^#]*? (\w+)\.py\b([^#]*)", line)
            if match and "../" not in line.split(".py")[0]:
                found.append((folder + match[1], shlex.split(match[2])))
    return found


def test_the_readme_has_commands_of_every_script() -> None:
    assert {script for script, _ in commands()} == set(SCRIPTS)


def test_flags_in_the_text_exist() -> None:
    known = {"--nproc_per_node", "--help", "--local_rank"}
    parsers = [importlib.import_module(f"DDAE.{script}").parse for script in SCRIPTS]
    for parse in (*parsers, lambda argv: tables.main("DDAE.tables", {}, argv=argv)):
        known |= help_flags(parse)
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", prose)) <= known
