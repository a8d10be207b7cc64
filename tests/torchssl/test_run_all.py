"""The whole experiment on tiny settings: it ends in a report, does nothing twice, and survives being killed."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from EDM.training.snapshots import read_snapshot
from tests.shared.programs import ROOT, assert_same, environment

STAGE_1 = "--num_train_iter=6 --num_eval_iter=3 --batch_size=4 --uratio=2 --num_save_iter=1"
STAGE_2 = "--duration=0.001 --batch=16 --tick=1 --checkpoint-seconds=0.05"
TINY = ["--images-per-class=3", "--gpus=1", f"--stage1-args={STAGE_1}", f"--stage2-args={STAGE_2}",
        f"--stage3-args={STAGE_1}"]
NAME = "freematch_digits_10_1"


def start(out: Path, *arguments: str) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(ROOT / "run_all.sh"), f"--out={out}", "--verbose", *TINY, *arguments]
    return subprocess.Popen(command, text=True, env=environment(PATH=path), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out[-4000:]
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """An experiment that nobody interrupted: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, finish(start(out))


def test_it_ends_in_a_report(whole):
    out, printed = whole
    report = json.loads((out / "report.json").read_text())
    for key in ("stage1_accuracy", "pseudo_label_accuracy", "stage3_accuracy"):
        assert 0 <= report[key] <= 1
    assert len(report["pseudo_label_accuracy_by_class"]) == 10
    assert {"stage1", "stage2", "stage3", "total"} <= set(report["seconds"])
    # So short a training may give a class no pseudo-label; the diffusion model then does not draw it.
    drawn = [3 * bool(count) for count in report["pseudo_label_counts"]]
    assert report["generated"]["by_class"] == drawn
    assert report["generated"]["feature_distance"] > 0
    assert report["pictures"] == ["generated.png", "curves.png", "confusion.png"]
    assert all((out / picture).stat().st_size > 1000 for picture in report["pictures"])
    assert re.search(rf"report: {out}/report.md\n# \d+\.\d s\n$", printed) and (out / "report.md").exists()
    assert len(list((out / "data-aug" / NAME / "nums_2").rglob("*.png"))) == sum(drawn)


def test_the_same_command_again_does_nothing_twice(whole):
    out, _ = whole
    work = [path for path in out.rglob("*") if path.is_file() and path.suffix in (".pth", ".pt", ".pkl", ".png", ".zip")
            and path.parent != out]
    before = {path: path.stat().st_mtime_ns for path in work}
    printed = finish(start(out))
    # What get_labels.py prints goes to a file, as in the published command.
    assert printed.count("complete: ") == 6 and "it/s" not in printed
    assert (out / "saved_models" / NAME / "get_labels.log").read_text().count("complete: ") == 1
    assert {path: path.stat().st_mtime_ns for path in work} == before


@pytest.mark.slow
def test_tdsm_joins_a_finished_experiment(whole, tmp_path):
    """What plain DPT has made is taken over as it is; only the steps of TDSM are run."""
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    tiny = ("--stage2=tdsm", "--transition=held-out", "--held-out=20", f"--classifier-args={STAGE_2} --ema=0.01")
    printed = finish(start(out, *tiny))
    assert printed.count("complete: ") == 7  # plain DPT's, and the judge, which serves both evaluations
    assert {path: path.stat().st_mtime_ns for path in before} == before
    report = json.loads((out / "report.json").read_text())
    assert 0 <= report["stage3_tdsm_accuracy"] <= 1 and report["tdsm"]["transition"]["held_out"] == 20
    assert report["tdsm"]["minus_stage3"] == report["stage3_tdsm_accuracy"] - report["stage3_accuracy"]
    assert set(report["tdsm"]["images_of_the_right_class"]) == {"plain", "tdsm"}
    assert report["tdsm"]["generated"]["by_class"] == [3] * 10 and "generated_tdsm.png" in report["pictures"]
    assert "over plain DPT" in printed and "TDSM minus stage 3 of plain DPT" in (out / "report.md").read_text()
    # The matrix that the diffusion model was trained with is the estimated one.
    snapshots = [read_snapshot(next(out.glob(f"training-runs/*-tdsm-held-out-20{part}/network-snapshot-latest.pkl")))
                 for part in ("-classifier", "")]
    for snapshot in snapshots:
        np.testing.assert_allclose(snapshot.loss_kwargs["transition_matrix"],
                                   report["tdsm"]["transition"]["transition_matrix"], atol=1e-6)
    assert finish(start(out, *tiny)).count("complete: ") == 13


@pytest.mark.slow
def test_killed_in_every_stage_it_continues_to_the_same_numbers(whole, tmp_path):
    out = tmp_path / "out"
    for sign in (f"saved_models/{NAME}/latest_model.pth", "training-runs/*/checkpoint.pt", "data-aug/*/*/*/*.png",
                 f"saved_models/{NAME}_aug2/latest_model.pth"):
        process = start(out)
        until = time.monotonic() + 300
        while not list(out.glob(sign)):
            assert process.poll() is None and time.monotonic() < until, f"{sign} did not appear"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(start(out))

    other, _ = whole
    for name in (NAME, f"{NAME}_aug2"):
        states = [torch.load(folder / "saved_models" / name / "latest_model.pth", weights_only=True)
                  for folder in (out, other)]
        for part in ("model", "ema_model", "optimizer", "algorithm", "it"):
            assert_same(states[0][part], states[1][part], f"{name}/{part}")
    for pattern in (f"saved_models/{NAME}/pseudo_label.npy", f"saved_models/{NAME}/*.zip", "data-aug/**/*.png"):
        files = sorted(path.relative_to(out) for path in out.glob(pattern))
        assert files and files == sorted(path.relative_to(other) for path in other.glob(pattern))
        assert all((out / path).read_bytes() == (other / path).read_bytes() for path in files), pattern
    reports = [json.loads((folder / "report.json").read_text()) for folder in (out, other)]
    for key in ("stage1_accuracy", "pseudo_label_accuracy", "stage3_accuracy", "accuracy"):
        assert reports[0][key] == reports[1][key]


@pytest.mark.slow
def test_other_settings_of_stage_1_are_another_data_set_for_stage_2(whole, tmp_path):
    """Stage 1 is trained anew beside what it was; stage 2, which would not fit, stops in one line and is left alone,
    until --overwrite makes everything anew."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    model = next(out.glob("training-runs/*/network-snapshot-latest.pkl"))
    before = model.read_bytes()
    process = start(out, f"--stage1-args={STAGE_1} --lr=0.3")
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and (out / "saved_models" / f"{NAME}.replaced-1" / "result.json").exists()
    assert "another content of --data" in printed and model.read_bytes() == before
    assert 'stopped in "diffusion model" (exit status 2); the same command continues from here' in printed
    printed = finish(start(out, f"--stage1-args={STAGE_1} --lr=0.3", "--overwrite"))
    assert len(list(out.glob("training-runs/*.replaced-1"))) == 1 and (out / "report.json").exists()
    assert model.read_bytes() != before


@pytest.mark.slow
def test_several_seeds_and_controls(tmp_path):
    out = tmp_path / "out"
    finish(start(out, "--seeds=2", "--controls"))
    report = json.loads((out / "report.json").read_text())
    assert report["seeds"] == [1, 2] and report["differences"]["stage3_minus_stage1_accuracy"]["seeds"] == 2
    controls = {"control_other_seed", "control_twice", "control_real_all", "control_real_balanced"}
    assert controls | {"stage1_two_runs"} <= set(report["summary"])
    assert json.loads((out / "seed_2" / "report.json").read_text())["iterations"] == {"stage1": 6, "stage3": 6}
    index = [(out / "saved_models" / f"{NAME}{suffix}" / "sampled_label_idx.npy").read_bytes()
             for suffix in ("", "_other_seed", "_aug2")]
    assert index[0] == index[1] == index[2]
    assert "| stage 1, the iterations of stages 1 and 3 together |" in (out / "report.md").read_text()
