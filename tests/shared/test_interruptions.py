"""What may befall a run from outside: death in the middle of a save, disks that fill up; and how its memory grows."""
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from shared.training.checkpoint import read_checkpoint
from tests.shared.programs import ROOT, assert_same, growth, one_line_error, run

PROGRAM, MISHAP = ROOT / "tests/shared/tiny_run.py", "tests/shared/mishap.py"


def final(folder: Path) -> dict:
    return torch.load(folder / "final.pt", weights_only=True)


def test_killed_at_a_hundred_moments_of_saving(tmp_path: Path) -> None:
    """Every time the folder holds a whole checkpoint, no older than the last completed one; the end is bitwise that of
    a run that nobody disturbed."""
    steps = run("tests/shared/killed_saves.py", tmp_path / "killed", "100", "0").stdout.strip()
    assert int(steps) > 100
    run(PROGRAM, tmp_path / "whole", "--steps", steps)
    assert_same(final(tmp_path / "killed"), final(tmp_path / "whole"))


def in_namespace(*flags: str) -> list[str]:
    """Return a command that starts another one with other rights; skip where the system allows none."""
    command = ["unshare", "--user", *flags]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("this system lets nobody start a program with other rights")
    return command


SMALL_DISK = 'mount -t tmpfs -o size=256k none "$0" && "$@"; status=$?; cp -a "$0/." "$0.kept"; exit $status'


def test_a_full_disk_in_the_middle(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    beside = [*in_namespace("--map-root-user", "--mount"), "sh", "-c", SMALL_DISK, str(disk)]
    failed = run(MISHAP, "full", "16", PROGRAM, disk / "run", before=beside, status=2)
    said = rf"error: No space left on device: {disk}/run/?\S*; the last checkpoint is whole"
    assert re.match(said, one_line_error(failed))
    assert read_checkpoint(tmp_path / "disk.kept" / "run" / "checkpoint.pt")["step"] == 14


def test_a_folder_that_may_no_longer_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    ordinary = in_namespace("--map-user=1000") if os.geteuid() == 0 else []
    failed = run(MISHAP, "read-only", "16", PROGRAM, tmp_path / "run", before=ordinary, status=2)
    assert one_line_error(failed).startswith(f"error: Permission denied: {tmp_path}/run")
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 14


def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    run(MISHAP, "memory", "100", PROGRAM, tmp_path / "run", "--steps=2000", "--save-every=100", cwd=tmp_path)
    assert growth(tmp_path / "memory") < 1
