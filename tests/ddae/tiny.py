"""A DDAE on the digits that trains in a second, and calls of the scripts as a user makes them."""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from sklearn.datasets import load_digits

from DDAE import sample, train
from DDAE.ddae import training
from shared.training.checkpoint import read_checkpoint
from tests.shared.clean import clean_process

# Of 100 images, so that an epoch has 3 steps, the last one shorter.
TINY = {
    "dataset": "digits.npz", "classes": 10, "model_type": "EDM", "net_type": "UNet",
    "diffusion": {"sigma_data": 0.5, "augment_prob": 0.3},
    "network": {"image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 2], "is_attn": [False, True],
                "dropout": 0.2, "n_blocks": 1, "augment_dim": 9, "use_res_for_updown": True},
    "n_epoch": 3, "batch_size": 40, "lrate": 1.0e-3, "warm_epoch": 2, "flip": True, "ema": 0.9, "n_sample": 2,
    "save_dir": "./out",
    "linear": {"n_epoch": 2, "batch_size": 128, "lrate": 1.0e-2, "timestep": 4, "blockname": "out_2"},
}
DDPM = {"model_type": "DDPM", "diffusion": {"n_T": 50, "betas": [1.0e-3, 0.2]},
        "network": {**TINY["network"], "augment_dim": 0, "use_res_for_updown": False}}
STEPS = 9
# What a run measures of the machine and not of the method.
NOT_BITWISE = {"seconds", "stats_bytes", "log_sums"}


def write_config(folder: Path, name: str = "tiny.yaml", **changes: Any) -> Path:
    """Write the tiny config with `changes` and its images into `folder` and return its path."""
    pixels, labels = load_digits(return_X_y=True)
    np.savez(folder / "digits.npz", images=np.rint(pixels[:100].reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8),
             labels=labels[:100])
    path = folder / name
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def call(module: ModuleType, *flags: str, folder: Path | None = None) -> None:
    """Run a script's main in this process, in `folder`."""
    before, place = sys.argv, Path.cwd()
    sys.argv = [module.__name__, *flags]
    os.chdir(folder or place)
    try:
        module.main()
    finally:
        sys.argv = before
        os.chdir(place)


def train_in(folder: Path, *flags: str) -> None:
    call(train, "--config=tiny.yaml", "--device=cpu", *flags, folder=folder)


def sample_in(folder: Path, *flags: str) -> None:
    call(sample, "--config=tiny.yaml", "--device=cpu", *flags, folder=folder)


def checkpoint(folder: Path) -> dict[str, Any]:
    """Return what the run in `folder`/out saved to be continued, without what depends on the clock."""
    content = read_checkpoint(folder / "out" / "checkpoint.pt")
    return {key: value for key, value in content.items() if key not in NOT_BITWISE}


def model(folder: Path, epoch: int) -> dict[str, Any]:
    return read_checkpoint(folder / "out" / "ckpts" / f"model_{epoch}.pth")


def _child(folder: Path, flags: tuple[str, ...], die_at: int, when: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends

    def fatal(function: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("step", die_at) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped

    setattr(training, when, fatal(getattr(training, when)))
    train_in(folder, *flags)


def killed_training(folder: Path, *flags: str, at: int, when: str = "training_step") -> None:
    """Train in a process of its own, which is killed when it comes to step `at`, or to the call `when`."""
    process = clean_process(_child, folder, flags, at, when)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
