"""FreeMatch on the digits, small enough for a test: a run of a second, in a process that a test may kill."""
from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.shared.clean import clean_process
from TorchSSL import freematch
from TorchSSL.core.algorithm import Algorithm
from TorchSSL.core.trainer import train

TINY = ("--dataset=digits --num_labels=20 --batch_size=4 --uratio=2 --num_train_iter=12 --num_eval_iter=4 "
        "--num_save_iter=3 --save_name=tiny --depth=10 --widen_factor=1 --bn_momentum=0.1 --ema_m=0.9 --ema_p=0.9 "
        "--weak_pad=1 --weak_pad_mode=zero --weak_subpixel=True --weak_flip=False --eval_batch_size=500").split()
# What a run measures of the machine and not of the method.
NOT_BITWISE = {"seconds", "stats_bytes", "log_sums"}


def call(*extra: str) -> None:
    """Train FreeMatch in this process with the tiny settings and `extra` flags."""
    train(freematch.parse([*TINY, *extra]), freematch.FreeMatch)


def learner_class(script: ModuleType) -> type[Algorithm]:
    """Return the learner of a script."""
    found, = (value for value in vars(script).values() if isinstance(value, type) and issubclass(value, Algorithm)
              and value is not Algorithm)
    return found


def _child(folder: Path, extra: tuple[str, ...], sabotage: Callable[[], None] | None) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = open(folder / "stdout.txt", "a", buffering=1)  # noqa: SIM115 - until the process ends
    sys.stderr = open(folder / "stderr.txt", "a", buffering=1)  # noqa: SIM115
    if sabotage is not None:
        sabotage()
    try:
        call(*extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)


def start(folder: Path, *extra: str, sabotage: Callable[[], None] | None = None) -> multiprocessing.Process:
    """Start a run in `folder`. sabotage: called in its process before it begins."""
    process = clean_process(_child, folder, extra, sabotage)
    process.start()
    return process


def run(folder: Path, *extra: str, status: int = 0, sabotage: Callable[[], None] | None = None) -> None:
    """Run to the end in `folder` and check the exit status (-9: killed)."""
    process = start(folder, *extra, sabotage=sabotage)
    process.join(120)
    assert process.exitcode == status, (process.exitcode, (folder / "stderr.txt").read_text()[-2000:])


def checkpoint(folder: Path, name: str = "latest_model.pth") -> dict[str, Any]:
    """Return what the run in `folder` saved, without what depends on the clock."""
    content = read_checkpoint(folder / "saved_models" / "tiny" / name)
    return {key: value for key, value in content.items() if key not in NOT_BITWISE}
