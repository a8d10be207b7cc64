"""Killed at any moment and started again with the same command, a run ends bitwise as if nothing had happened."""
from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from shared.training import files
from shared.training.run import Run
from tests.metasemi import tiny
from tests.shared.programs import assert_same

WAYS = {"train_meta": ["--mix-up"], "train_baseline": []}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for script, flags in WAYS.items():
        folders[script] = tmp_path_factory.mktemp(script)
        tiny.run(folders[script], *flags, script=script)
    return folders


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


def die_in_replace(count: int) -> None:
    """From now on, die before the `count`-th renaming of a checkpoint."""
    replace, seen = os.replace, []

    def counted(source: str, target: str) -> None:
        seen.extend([1] * str(target).endswith((".pth", ".pth.previous")))
        if len(seen) == count:
            die()
        replace(source, target)

    files.os.replace = counted


def stop_after_steps(count: int) -> None:
    """From now on, ask the run to save and leave behind step `count`, as SIGTERM does."""
    after = Run._after_step

    def counted(self: Run, total: int) -> None:
        if self.step == count:
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, total)

    Run._after_step = counted


def check_same(folder: Path, whole: Path) -> None:
    for name in ("checkpoint.pth", "model_best.pth"):
        assert_same(tiny.checkpoint(folder, name), tiny.checkpoint(whole, name), name)
    for name in ("label_indices.txt", "stats.jsonl"):
        assert (folder / "run" / name).read_text() == (whole / "run" / name).read_text(), name
    result, wanted = (json.loads((path / "run/result.json").read_text()) for path in (folder, whole))
    assert {**result, "seconds": 0} == {**wanted, "seconds": 0}


# Each fourth step is evaluated and saved.
MOMENTS = {"before anything is saved": partial(die_after_steps, 2), "between saves": partial(die_after_steps, 7),
           "in the first best model": partial(die_in_replace, 1), "in a save": partial(die_in_replace, 4),
           "behind the last step": partial(die_after_steps, 12)}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_and_same_command(moment: str, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    tiny.run(tmp_path, "--mix-up", sabotage=MOMENTS[moment], status=-signal.SIGKILL)
    tiny.run(tmp_path, "--mix-up")
    check_same(tmp_path, uninterrupted["train_meta"])


def test_baseline_killed_again_and_again(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    for step in (5, 9):
        tiny.run(tmp_path, script="train_baseline", sabotage=partial(die_after_steps, step), status=-signal.SIGKILL)
    tiny.run(tmp_path, script="train_baseline")
    check_same(tmp_path, uninterrupted["train_baseline"])


def test_stopped_between_evaluations(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    """Averages since the last evaluation go on behind the stop."""
    tiny.run(tmp_path, "--mix-up", sabotage=partial(stop_after_steps, 6), status=143)
    assert tiny.checkpoint(tmp_path)["step"] == 6
    tiny.run(tmp_path, "--mix-up")
    check_same(tmp_path, uninterrupted["train_meta"])


def published(folder: Path, **other: object) -> dict[str, object]:
    """Return model_best.pth as the original code wrote it, memory in its order."""
    content = tiny.checkpoint(folder, "model_best.pth")
    plain = {key: value.contiguous() for key, value in content["model"].items()}
    optimizer = content["optimizer"]
    state = {key: {"momentum_buffer": kept["momentum_buffer"].contiguous()} for key, kept in optimizer["state"].items()}
    groups = [{key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params")}
              for group in optimizer["param_groups"]]
    return {"step": content["step"], "model": plain, "best_acc": content["best_acc"],
            "optimizer": {"state": state, "param_groups": groups}, **other}


def test_checkpoint_of_the_original_code(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    """It has four entries and another memory layout; the run goes on from its step and best accuracy."""
    content = published(uninterrupted["train_meta"], step=4)
    torch.save(content, tmp_path / "theirs.pth")
    tiny.run(tmp_path, "--mix-up", f"--resume={tmp_path / 'theirs.pth'}")
    ours = tiny.checkpoint(tmp_path)
    assert ours["step"] == 12 and ours["best_acc"] >= content["best_acc"]
    again = tmp_path / "run" / "checkpoint.pth"
    before = again.stat().st_mtime_ns
    tiny.run(tmp_path, "--mix-up", f"--resume={tmp_path / 'theirs.pth'}")  # the same command again: it is finished
    assert again.stat().st_mtime_ns == before


def test_layout_of_a_checkpoint_changes_nothing(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    """Steps from a checkpoint in the original's memory order are those from our own."""
    for name, content in (("a", tiny.checkpoint(uninterrupted["train_meta"], "model_best.pth")),
                          ("b", published(uninterrupted["train_meta"]))):
        (tmp_path / name).mkdir()
        torch.save({**content, "step": 8}, tmp_path / name / "start.pth")
        tiny.run(tmp_path / name, f"--resume={tmp_path / name / 'start.pth'}")
    a, b = (tiny.checkpoint(tmp_path / name)["model"] for name in "ab")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


def test_longer_training_of_the_same_folder(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    tiny.run(tmp_path, "--total-steps=8")
    tiny.run(tmp_path, status=2)
    assert "total_steps was 8, is 12" in tiny.errors(tmp_path)
    tiny.run(tmp_path, "--resume=run/checkpoint.pth")
    assert tiny.checkpoint(tmp_path)["step"] == 12


def test_other_settings_in_the_folder(tmp_path: Path) -> None:
    """They are an error, and with --overwrite a new start; labels of another seed are never continued."""
    tiny.run(tmp_path, "--total-steps=4")
    before = tiny.checkpoint(tmp_path)
    tiny.run(tmp_path, "--total-steps=4", "--lr=0.2", status=2)
    tiny.run(tmp_path, "--total-steps=4", "--seed=5", status=2)
    tiny.run(tmp_path, "--seed=5", "--resume=run/checkpoint.pth", status=2)
    assert "lr was 0.05, is 0.2" in tiny.errors(tmp_path)
    assert tiny.errors(tmp_path).count("lists other labelled images") == 2
    assert_same(tiny.checkpoint(tmp_path), before)
    tiny.run(tmp_path, "--total-steps=4", "--seed=5", "--overwrite")
    assert tiny.checkpoint(tmp_path)["config"]["seed"] == 5
