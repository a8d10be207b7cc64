"""Killed at any moment and started again with the same command, a run ends bitwise as if nothing had happened."""
from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from shared.training import files
from shared.training.run import Run
from tests.shared.programs import assert_same
from tests.torchssl import tiny


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny.run(folder)
    return folder


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_steps(count: int) -> None:
    """From now on, die behind step `count`, before anything of it is saved."""
    after = Run._after_step

    def counted(self: Run, total: int) -> None:
        if self.step == count:
            die()
        after(self, total)

    Run._after_step = counted


def die_in_replace(count: int, before: bool) -> None:
    """From now on, die in the `count`-th renaming of a checkpoint, before or behind it."""
    replace, seen = os.replace, []

    def counted(source: str, target: str) -> None:
        mine = str(target).endswith((".pth", ".pth.previous"))
        seen.extend([1] * mine)
        if mine and len(seen) == count and before:
            die()
        replace(source, target)
        if mine and len(seen) == count:
            die()

    files.os.replace = counted


def kill_after_steps(count: int) -> Callable[[], None]:
    return partial(die_after_steps, count)


def kill_in_replace(count: int, before: bool) -> Callable[[], None]:
    return partial(die_in_replace, count, before)


def check_same(folder: Path, whole: Path) -> None:
    for name in ("latest_model.pth", "model_best.pth"):
        assert_same(tiny.checkpoint(folder, name), tiny.checkpoint(whole, name), name)
    result, wanted = (json.loads((path / "saved_models/tiny/result.json").read_text()) for path in (folder, whole))
    assert {**result, "seconds": 0} == {**wanted, "seconds": 0}
    steps = [[json.loads(line)["step"] for line in (path / "saved_models/tiny/stats.jsonl").read_text().splitlines()]
             for path in (folder, whole)]
    assert steps[0] == steps[1]


# Steps 0, 4, 8 and 11 are evaluated, each third one is saved.
MOMENTS = {"before anything is saved": kill_after_steps(2), "between saves": kill_after_steps(7),
           "in the first best model": kill_in_replace(1, before=True),
           "behind the second rename": kill_in_replace(2, before=False),
           "between the renames of a save": kill_in_replace(4, before=False),
           "in a later save": kill_in_replace(6, before=True), "behind the last step": kill_after_steps(12)}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_and_same_command(moment: str, uninterrupted: Path, tmp_path: Path) -> None:
    tiny.run(tmp_path, sabotage=MOMENTS[moment], status=-signal.SIGKILL)
    tiny.run(tmp_path)
    check_same(tmp_path, uninterrupted)


def test_killed_again_and_again(uninterrupted: Path, tmp_path: Path) -> None:
    for step in (4, 8, 11):
        tiny.run(tmp_path, sabotage=kill_after_steps(step), status=-signal.SIGKILL)
    tiny.run(tmp_path)
    check_same(tmp_path, uninterrupted)


def test_sigterm_saves_and_leaves(uninterrupted: Path, tmp_path: Path) -> None:
    process = tiny.start(tmp_path, sabotage=partial(slow_steps, 0.2))
    stats = tmp_path / "saved_models/tiny/log.txt"
    while not (stats.exists() and "iteration" in stats.read_text()):
        time.sleep(0.02)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert 0 < tiny.checkpoint(tmp_path)["step"] < 12
    tiny.run(tmp_path)
    check_same(tmp_path, uninterrupted)


def slow_steps(seconds: float) -> None:
    after = Run._after_step

    def slowly(self: Run, total: int) -> None:
        time.sleep(seconds)
        after(self, total)

    Run._after_step = slowly


def test_finished_run_does_nothing(uninterrupted: Path) -> None:
    file = uninterrupted / "saved_models/tiny/latest_model.pth"
    before = file.stat().st_mtime_ns
    tiny.run(uninterrupted)
    assert file.stat().st_mtime_ns == before


def test_truncated_checkpoint_falls_back(uninterrupted: Path, tmp_path: Path) -> None:
    tiny.run(tmp_path, sabotage=kill_after_steps(8), status=-signal.SIGKILL)
    file = tmp_path / "saved_models/tiny/latest_model.pth"
    file.write_bytes(file.read_bytes()[:-1000])
    tiny.run(tmp_path)
    check_same(tmp_path, uninterrupted)


def test_resume_with_load_path(uninterrupted: Path, tmp_path: Path) -> None:
    """The published way: --resume --load_path FILE, from the best model or any other; statistics come along."""
    tiny.run(tmp_path, sabotage=kill_after_steps(8), status=-signal.SIGKILL)
    best = tmp_path / "saved_models/tiny/model_best.pth"
    assert torch.load(best, weights_only=True)["step"] == torch.load(best, weights_only=True)["it"] + 1
    tiny.run(tmp_path, "--resume", f"--load_path={best}")
    left, right = tiny.checkpoint(tmp_path), tiny.checkpoint(uninterrupted)
    for key in ("model", "ema_model", "optimizer", "algorithm", "scheduler"):
        assert_same(left[key], right[key], key)


def test_checkpoint_of_the_original_code(uninterrupted: Path, tmp_path: Path) -> None:
    """It has prefixed names and no thresholds: training goes on behind its counter, thresholds start anew."""
    ours = tiny.checkpoint(uninterrupted, "model_best.pth")
    published = {key: ours[key] for key in ("optimizer", "scheduler", "it")}
    published |= {key: {f"module.{name}": value for name, value in ours[key].items()} for key in ("model", "ema_model")}
    torch.save(published, tmp_path / "theirs.pth")
    tiny.run(tmp_path, "--resume", f"--load_path={tmp_path / 'theirs.pth'}")
    assert f"continuing at iteration {ours['it'] + 1}" in (tmp_path / "stdout.txt").read_text()
    content = tiny.checkpoint(tmp_path)
    assert content["step"] == 12 and content["scheduler"]["last_epoch"] == 12
    tiny.run(tmp_path, "--resume", f"--load_path={tmp_path / 'theirs.pth'}")  # the same command again: it is finished
    assert_same(tiny.checkpoint(tmp_path), content)


def test_other_configuration(uninterrupted: Path, tmp_path: Path) -> None:
    """Another configuration in the folder is an error, or with --overwrite moved aside; never continued or lost."""
    tiny.run(tmp_path)
    before = tiny.checkpoint(tmp_path)
    tiny.run(tmp_path, "--lr=0.5", status=2)
    assert "lr was 0.03, is 0.5" in (tmp_path / "stderr.txt").read_text()
    assert_same(tiny.checkpoint(tmp_path), before)
    tiny.run(tmp_path, "--lr=0.5", "--overwrite")
    assert tiny.checkpoint(tmp_path)["optimizer"]["param_groups"][0]["initial_lr"] == 0.5
    (tmp_path / "saved_models/tiny").rename(tmp_path / "saved_models/other")
    (tmp_path / "saved_models/tiny.replaced-1").rename(tmp_path / "saved_models/tiny")
    assert_same(tiny.checkpoint(tmp_path), before)


def test_labels_of_another_seed_are_refused(tmp_path: Path) -> None:
    tiny.run(tmp_path, sabotage=kill_after_steps(1), status=-signal.SIGKILL)
    before = (tmp_path / "saved_models/tiny/sampled_label_idx.npy").read_bytes()
    for flags in (["--seed=2"], ["--num_labels=30"]):
        tiny.run(tmp_path, *flags, status=2)
    errors = (tmp_path / "stderr.txt").read_text()
    assert "seed 1 there, 2 here" in errors and "num_labels 20 there, 30 here" in errors
    assert (tmp_path / "saved_models/tiny/sampled_label_idx.npy").read_bytes() == before
    tiny.run(tmp_path, "--seed=2", "--overwrite")
    assert (tmp_path / "saved_models/tiny/sampled_label_idx.npy").read_bytes() != before
