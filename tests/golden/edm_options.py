"""The command line of train.py: flags -> option dictionary, run folder, printed summary, errors."""
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.golden.cases import arrays, facts, golden_dir, index
from tests.shared.programs import run

OPTION_CASES = [case for case in index("edm")["cases"] if case["kind"] == "command line"]
CASES = {case["case"] for case in OPTION_CASES}
RUNS = [pytest.param(case, name, id=f"{case['case']}-{name}")
        for case in OPTION_CASES for name in json.loads((golden_dir("edm") / case["file"]).read_text())]

# The data sets that the cases name, and the converter outputs they consist of.
DATASETS = {"datasets/cifar10-32x32.zip": "cifar", "datasets/folded": "folder_json",
            "datasets/gray.v2.zip": "folder_gray_root_only"}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    for path, name in DATASETS.items():
        write_dataset(folder / path, name)
    return folder


def write_dataset(path: Path, name: str) -> None:
    """Write a converter's output again from the pixels, names and labels that the fixtures list."""
    case = facts("edm", "dataset_tool.json")[name]
    pixels = arrays("edm", "dataset_tool.npz")[f"{name}/pixels"]
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
    expected = facts("edm", case["file"])[name]
    os.symlink(datasets / "datasets", tmp_path / "datasets")
    for folder in expected["existing_dirs"]:
        (tmp_path / folder).mkdir(parents=True)
    for file in expected["existing_files"]:
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
