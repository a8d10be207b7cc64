"""The command line of train.py: flags -> option dictionary, run folder, printed summary, errors."""
from __future__ import annotations

import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.golden.cases import arrays, facts, name_of, serves
from tests.golden.edm_cases import PAPER, cases, flag
from tests.shared.programs import run

OPTION_CASES, TOOL = cases(kind="command line"), cases(kind="dataset tool")
SERVES = serves(OPTION_CASES)
RUNS = [pytest.param(case, name, id=f"{name_of(case)}-{name}")
        for case in OPTION_CASES for name in facts(PAPER, case.get("file", ""))]


def named_datasets() -> dict[str, str]:
    """Return the data sets of "PATH is the NAME output of ..., PATH its NAME output": path -> converter case."""
    return {path.rstrip("/"): name for case in OPTION_CASES for path, name in
            re.findall(r"(\S+/\S+) (?:is )?(?:the|its) (\S+) output", case.get("description", ""))}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """Return a folder with those of the named data sets whose pixels are known."""
    folder = tmp_path_factory.mktemp("options")
    for path, name in named_datasets().items():
        for case in TOOL:
            if name in facts(PAPER, case["file"]) and f"{name}/pixels" in arrays(PAPER, case["arrays_file"]):
                write_dataset(folder / path, case, name)
    return folder


def write_dataset(path: Path, converter: dict, name: str) -> None:
    """Write a converter's output again from the pixels, names and labels that the fixtures list."""
    case = facts(PAPER, converter["file"])[name]
    pixels = arrays(PAPER, converter["arrays_file"])[f"{name}/pixels"]
    members = {"dataset.json": case["dataset_json"].encode()}
    for member, image in zip([m for m in case["members"] if m != "dataset.json"], pixels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(buffer, "png")
        members[member] = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return
    for member, content in members.items():
        (path / member).parent.mkdir(parents=True, exist_ok=True)
        (path / member).write_bytes(content)


@pytest.mark.parametrize("case, name", RUNS)
def test_command_line(case, name, datasets, tmp_path):
    expected = facts(PAPER, case["file"])[name]
    data = (flag(expected["args"], "--data") or "").rstrip("/")
    if data in named_datasets() and not (datasets / data).exists():
        pytest.skip(f"there are no pixels for {data}")
    for folder in datasets.iterdir():
        os.symlink(folder, tmp_path / folder.name)
    for folder in expected.get("existing_dirs", ()):
        (tmp_path / folder).mkdir(parents=True)
    for file in expected.get("existing_files", ()):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    before = sorted(tmp_path.rglob("*"))
    result = run("EDM/train.py", *expected["args"], "--dry-run", cwd=tmp_path, status=2 if "error" in expected else 0,
                 WORLD_SIZE=str(expected["world_size"]), RANK="0")
    assert sorted(tmp_path.rglob("*")) == before  # nothing is created
    if "error" in expected:
        assert result.stderr.count("\n") == 1 and expected["message"] in result.stderr
        return
    text = result.stdout
    options = json.loads(text[text.index("{"):text.rindex("\n}") + 2])
    assert options == expected["options"]
    assert options["run_dir"] == expected["run_dir"]
    assert [line for line in text.split("\n}\n", 1)[1].splitlines() if line] == expected["summary"]
