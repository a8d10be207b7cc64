"""Runs of the trainer: killed and continued, finished, measured; what lies in their folder."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from DASO import get_labels, plot_pseudo_labels
from DASO.lib.algorithm import ALGORITHMS
from DASO.lib.config.config import Config, read_yaml
from DASO.lib.config.defaults import LEARNERS as NAMES
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.daso import small
from tests.daso.small import call, command, saved
from tests.shared.programs import ROOT, assert_same, environment, run

CONFIGS = ROOT / "DASO" / "configs" / "digits"

LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DASO with ABC and adjusted logits": ("fixmatch_daso", {
        "ALGORITHM.ABC.APPLY": True, "ALGORITHM.LOGIT_ADJUST.APPLY": True}),
    "FixMatch with alignment": ("fixmatch", {"MODEL.DIST_ALIGN.APPLY": True}),
    "supervised, LDAM, classes drawn alike": ("supervised", {
        "MODEL.LOSS.WITH_LABELED_COST_SENSITIVE": True, "MODEL.LOSS.WARMUP_ITERS": 3, "SOLVER.STEPS": (4,),
        "DATASET.SAMPLER_NAME": "ClassAwareSampler"}),
}
# As well, when slow tests are asked for: every other one there is.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    **small.LEARNERS, "supervised": ("supervised", {}), "PseudoLabel": ("pseudolabel", {}), "cRT": ("crt", {})}
# Breaks off as a power cut would: behind the checkpoint of iteration 3, when iteration 5 has moved everything.
KILLED_AT_5 = """
import os, signal, sys
from DASO import main
from DASO.lib.trainer import Trainer
step = Trainer.step
def broken(trainer, batch, it, draws):
    found = step(trainer, batch, it, draws)
    if it == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
Trainer.step = broken
main.main()
"""


def killed(config: str, folder: Path, keys: dict[str, Any]) -> None:
    """Run until it is killed."""
    ended = subprocess.run([sys.executable, "-c", KILLED_AT_5, *command(config, folder, keys)], env=environment(),
                           capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of DASO with test images."""
    config, keys = LEARNERS["DASO with ABC and adjusted logits"]
    return call(config, tmp_path_factory.mktemp("finished"), {**keys, "EVAL_ON_TEST_SET": True, "PERIODS.EVAL": 3,
                                                              "PERIODS.LOG": 3})


@pytest.mark.parametrize("name", [*LEARNERS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_killed_and_continued_is_bitwise_the_same(name: str, tmp_path: Path) -> None:
    config, keys = {**LEARNERS, **OTHERS}[name]
    if name == "cRT":
        keys = {"ALGORITHM.CRT.TARGET_DIR": str(call("fixmatch", tmp_path / "encoder", {}))}
    whole = call(config, tmp_path / "whole", keys)
    killed(config, tmp_path / "parts", keys)
    parts = call(config, tmp_path / "parts", keys)
    assert read_checkpoint(parts / "checkpoint.pth.tar")["step"] == 6
    assert_same(saved(parts), saved(whole))
    lines = [[json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
             for folder in (parts, whole)]
    for a, b in zip(*lines, strict=True):
        assert {k: v for k, v in a.items() if "_time" not in k} == {k: v for k, v in b.items() if "_time" not in k}


def test_no_learner_is_left_out() -> None:
    """Every one that ALGORITHM.NAME knows has a class, and is killed and continued above."""
    assert set(ALGORITHMS) == set(NAMES)
    files = {config for config, _ in (*LEARNERS.values(), *OTHERS.values())}
    assert {read_yaml(CONFIGS / f"{config}.yaml")["ALGORITHM.NAME"] for config in files} == set(ALGORITHMS)


def test_state_of_daso_is_kept(finished: Path) -> None:
    state = read_checkpoint(finished / "checkpoint.pth.tar")["algorithm"]
    assert state["queue"]["pushed"].sum() == 6 * 8  # every labelled image of six batches of eight
    assert state["blender"]["histogram"].sum() == pytest.approx(1)


def test_files_of_a_run(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.json", "checkpoint.pth.tar", "model_final.pth.tar", "results.json", "summary.json",
            "log.txt", "result.json"} <= names
    assert finished.name == "DASO_digits_l_40_10_ul_70_10_seed_0"
    cfg = Config(read_yaml(finished / "config.yaml"))
    assert cfg.SEED == 0 and Path(cfg.OUTPUT_DIR) == finished
    assert yaml.safe_load((finished / "config.yaml").read_text())["SOLVER"]["IMS_PER_BATCH"] == 8


def test_results_are_the_published_ones_and_more(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [3, 6]
    history = json.loads((finished / "results.json").read_text())
    assert set(history) == {f"{split}/{name}{median}" for split in ("valid", "test") for name in ("top1", "top1_la")
                            for median in ("", "_median20")}
    course = history["test/top1"]
    assert course == [line["test/top1"] for line in lines]
    found = json.loads((finished / "summary.json").read_text())["accuracy"]["test/top1"]
    assert found == {"last": course[-1], "median20": np.median(course), "best": max(course)}
    groups = json.loads((finished / "summary.json").read_text())["accuracy"]
    classes = np.array(groups["test/classes"]["last"])
    assert groups["test/few"]["last"] == pytest.approx(classes[7:].mean())
    result = json.loads((finished / "result.json").read_text())
    assert result["accuracy"]["last"] == pytest.approx(course[-1] / 100)


def test_published_form_of_checkpoint(finished: Path) -> None:
    content = read_checkpoint(finished / "model_final.pth.tar")
    assert list(content)[:5] == ["model", "ema_model", "optimizer", "scheduler", "meta"]
    assert content["classes"] == tuple("0123456789") and content["size"] == (8, 8)
    assert all(name.startswith("ema_model.") for name in content["ema_model"])
    assert content["meta"]["iter"] == 6 and content["meta"]["test/top1_best"] >= content["meta"]["test/top1"]


def test_checkpoint_of_the_original_is_loaded(finished: Path, tmp_path: Path) -> None:
    """It holds float counters in the average and numpy's numbers in `meta`; the run goes on at its iteration."""
    content = read_checkpoint(finished / "model_final.pth.tar")
    content["ema_model"] = {name: value.float() for name, value in content["ema_model"].items()}
    content["meta"] = {"iter": 4, "test/top1": np.float64(50.0), "test/top1_best": np.float32(51.0)}
    del content["optimizer"], content["scheduler"]
    torch.save(content, tmp_path / "foreign.pth.tar", _use_new_zipfile_serialization=False)
    config, keys = LEARNERS["DASO with ABC and adjusted logits"]
    folder = call(config, tmp_path / "out", {**keys, "RESUME": str(tmp_path / "foreign.pth.tar")})
    assert read_checkpoint(folder / "checkpoint.pth.tar")["algorithm"]["queue"]["pushed"].sum() == 2 * 8


def test_eval_only(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, keys = LEARNERS["DASO with ABC and adjusted logits"]
    keys = {**keys, "EVAL_ON_TEST_SET": True, "RESUME": str(finished / "model_final.pth.tar")}
    pairs = command(config, tmp_path, keys)
    done = run("DASO/main.py", *pairs[:2], "--eval-only", *pairs[2:])
    found = json.loads(done.stdout)
    last = json.loads((finished / "metrics.json").read_text().splitlines()[-1])
    assert found["test/top1"] == pytest.approx(last["test/top1"]) and "test/few" in found
    assert not any(tmp_path.iterdir())


def test_a_finished_run_is_left_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, keys = LEARNERS["DASO with ABC and adjusted logits"]
    results = [*finished.glob("*.pth.tar"), finished / "result.json", finished / "summary.json"]
    before = [path.stat().st_mtime_ns for path in results]
    call(config, finished.parent, {**keys, "EVAL_ON_TEST_SET": True, "PERIODS.EVAL": 3, "PERIODS.LOG": 3})
    assert f"complete: {finished}" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in results] == before


def test_labels_are_made_once(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", str(finished), "--dest", str(tmp_path), "--per_class"]
    get_labels.main([*arguments, "2"])
    capsys.readouterr()
    get_labels.main([*arguments, "2"])
    assert capsys.readouterr().out == "".join(f"complete: {tmp_path / name}\n"
                                              for name in ("pseudo_label.npz", "real_balanced"))
    with pytest.raises(UserError, match="--per_class was 2, is 3"):
        get_labels.main([*arguments, "3"])
    get_labels.main([*arguments, "3", "--overwrite"])
    assert len(list((tmp_path / "real_balanced").glob("*/*.png"))) == 30


def test_plot_of_pseudo_labels(finished: Path, tmp_path: Path) -> None:
    plot_pseudo_labels.main([str(finished), str(finished), "--out", str(tmp_path / "figure.png")])
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG" and image.width > 600


def test_no_validation_images_and_no_evaluation_before_a_checkpoint(tmp_path: Path) -> None:
    folder = call("fixmatch", tmp_path, {"DATASET.NUM_VALID": 0, "EVAL_ON_TEST_SET": True, "PERIODS.CHECKPOINT": 1,
                                         "SOLVER.MAX_ITER": 2})
    assert set(json.loads((folder / "results.json").read_text())) == {
        "test/top1", "test/top1_la", "test/top1_median20", "test/top1_la_median20"}
