"""MetaSemi on the digits, small enough for a test: a run of a second, in a process that a test may kill."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from MetaSemi import train_baseline, train_meta
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.shared.clean import clean_process

SCRIPTS = {"train_meta": train_meta, "train_baseline": train_baseline}
TINY = ("--dataset=digits -a=small --num-label=20 --batch-size=8 --total-steps=12 --test-freq=4 --print-freq=2 "
        "--warmup=3 --lr=0.05").split()
# What a run measures of the machine and not of the method.
NOT_BITWISE = {"seconds", "stats_bytes", "log_sums"}


def call(script: str, *extra: str) -> None:
    """Run a script's main in this process with the tiny settings and `extra` flags, in the folder `run`."""
    before = sys.argv
    sys.argv = [f"{script}.py", *TINY, "--save-path=run", *extra]
    try:
        SCRIPTS[script].main()
    finally:
        sys.argv = before


def _child(folder: Path, script: str, extra: tuple[str, ...], sabotage: Callable[[], None] | None) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = open(folder / "stdout.txt", "a", buffering=1)  # noqa: SIM115 - until the process ends
    sys.stderr = open(folder / "stderr.txt", "a", buffering=1)  # noqa: SIM115
    if sabotage is not None:
        sabotage()
    try:
        call(script, *extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(error.status)


def run(folder: Path, *extra: str, script: str = "train_meta", status: int = 0,
        sabotage: Callable[[], None] | None = None) -> None:
    """Run to the end in `folder` and check the exit status (-9: killed). sabotage: called before it begins."""
    process = clean_process(_child, folder, script, extra, sabotage)
    process.start()
    process.join(240)
    assert process.exitcode == status, (process.exitcode, (folder / "stderr.txt").read_text()[-2000:])


def checkpoint(folder: Path, name: str = "checkpoint.pth") -> dict[str, Any]:
    """Return what the run in `folder` saved, without what depends on the clock."""
    return {key: value for key, value in read_checkpoint(folder / "run" / name).items() if key not in NOT_BITWISE}


def errors(folder: Path) -> str:
    return (folder / "stderr.txt").read_text()
