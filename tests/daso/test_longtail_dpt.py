"""Long-tailed DPT: its commands, generated images among the labelled ones, the labels it hands on, its report."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from DASO import dpt_report, get_labels
from DASO.lib.config.config import read_yaml
from DASO.lib.data.sets import load_data
from shared.cli import UserError
from shared.data.images import ImageSet, read_images
from shared.data.writers import write_folder
from tests.daso.small import call, command
from tests.shared.programs import ROOT, environment


def commands(*arguments: str) -> list[str]:
    """Return the commands that run_all.sh would run, with the folder of each."""
    done = subprocess.run(["bash", str(ROOT / "run_all.sh"), "--dry-run", *arguments], check=True, text=True,
                          capture_output=True, env=environment())
    found, folder = [], ""
    for line in done.stdout.splitlines():
        if line.startswith("cd "):
            folder = line.rpartition("/")[2].removeprefix("cd ")
        elif line and not line.startswith(("#", "export ")):
            found.append(f"{folder}: {line}")
    return found


def test_commands() -> None:
    found = commands("--stage1=daso", "--imbalance=50", "--out=/out", "--gpus=1", "--seed=7")
    assert [line.split()[:3] for line in found] == [
        ["DASO:", "python", "main.py"], ["DASO:", "python", "get_labels.py"], ["EDM:", "python", "dataset_tool.py"],
        ["EDM:", "python", "train.py"], ["EDM:", "bash", "generate.sh"], ["DASO:", "python", "main.py"],
        ["DASO:", "python", "dpt_report.py"]]
    for line in (found[0], found[5]):
        assert "configs/digits/fixmatch_daso.yaml" in line and "SEED 7" in line
        assert "DATASET.DIGITS.IMB_FACTOR_L 50" in line and "DATASET.DIGITS.IMB_FACTOR_UL 50" in line
    images = found[4].split()[4]
    assert f"DATASET.AUG_PATH {images} MEMO aug100" in found[5]
    assert "DASO_digits_l_40_50_ul_70_50_seed_7_aug100" in found[6]
    twice = commands("--stage1=daso", "--controls", "--out=/out")
    length = read_yaml(ROOT / "DASO/configs/digits/fixmatch_daso.yaml")["SOLVER.MAX_ITER"]
    assert any(f"SOLVER.MAX_ITER {2 * length} MEMO twice" in line for line in twice)
    twice = commands("--stage1=daso", "--controls", "--stage1-args=SOLVER.MAX_ITER 50")
    assert any("SOLVER.MAX_ITER 50 SOLVER.MAX_ITER 100 MEMO twice" in line for line in twice)


def generated(folder: Path, per_class: int = 3, side: int = 8) -> Path:
    """Write a folder of noise, a sub-folder a class."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10 * per_class, 1, side, side), dtype=np.uint8)
    write_folder(ImageSet(images, np.arange(10).repeat(per_class), tuple(map(str, range(10))), "noise"), folder)
    return folder


def configuration(folder: Path, **keys: object) -> object:
    from DASO.lib.config.config import parse

    return parse(command("fixmatch_daso", folder, {f"DATASET.{key}": value for key, value in keys.items()}))[0]


def test_generated_images_join_the_labelled_ones(tmp_path: Path) -> None:
    plain = load_data(configuration(tmp_path))
    data = load_data(configuration(tmp_path, AUG_PATH=generated(tmp_path / "images")))
    assert (data.counts == plain.counts + 3).all() and (data.real_counts == plain.counts).all()
    assert np.array_equal(data.unlabelled.images, plain.unlabelled.images)
    with pytest.raises(UserError, match="16x16, not 8x8"):
        load_data(configuration(tmp_path, AUG_PATH=generated(tmp_path / "large", side=16)))


def test_labels_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two finished runs: labels of every image, real images evened out, and what each class gained."""
    keys = {"EVAL_ON_TEST_SET": True}
    first = call("fixmatch_daso", tmp_path / "first", keys)
    again = call("fixmatch_daso", tmp_path / "again", {**keys, "DATASET.AUG_PATH": str(generated(tmp_path / "images"))})

    def start(program: object, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        program.main()

    start(get_labels, "--run", str(first), "--per_class", "4")
    labels, report = read_images(first / "pseudo_label.npz"), json.loads((first / "pseudo_label.json").read_text())
    data = load_data(configuration(tmp_path))
    known = len(data.labelled)
    assert np.array_equal(labels.labels[:known], data.labelled.labels) and len(labels) == known + len(data.unlabelled)
    agreement = float((labels.labels[known:] == data.unlabelled.labels).mean())
    assert report["agreement"] == pytest.approx(agreement)
    assert sum(report["pseudo_label_counts"]) == len(data.unlabelled)
    even = read_images(first / "real_balanced")
    assert np.bincount(even.labels, minlength=10).tolist() == [4] * 10

    for out in (tmp_path / "1", tmp_path / "2"):
        start(dpt_report, f"--out={out}", f"--stage1={first}", f"--stage3={again}")
    content = json.loads((tmp_path / "1" / "report.json").read_text())
    assert content["by_class"]["stage3"] == json.loads((again / "result.json").read_text())["accuracy_by_class"]
    assert (tmp_path / "1" / "classes.png").stat().st_size > 1000
    start(dpt_report, f"--out={tmp_path}", f"--seed_report={tmp_path / '1'}", f"--seed_report={tmp_path / '2'}")
    gain = content["accuracy"]["stage3"]["last"] - content["accuracy"]["stage1"]["last"]
    merged = json.loads((tmp_path / "report.json").read_text())["runs"]["stage3"]["all"]["gain"]
    assert merged["mean"] == pytest.approx(gain) and merged["standard_error"] == pytest.approx(0)
