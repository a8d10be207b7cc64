"""A DDAE on the digits that trains in a second, checkpoints to evaluate, and calls of the scripts."""
from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from sklearn.datasets import load_digits

from DDAE import sample, train
from DDAE.ddae import training
from DDAE.ddae.checkpoints import checkpoint_path, write_model
from DDAE.ddae.config import make_network, read_config
from shared.training.checkpoint import read_checkpoint
from shared.training.run import Run
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
LINEAR = {"n_epoch": 2, "batch_size": 20, "lrate": 1.0e-2, "timestep": 4, "blockname": "out_2", "flip": False, "pad": 1}
STEPS = 9
TRAIN, TEST = 50, 23    # images to evaluate on: neither number is shared evenly by two processes or by whole batches
# What a run measures of the machine and not of the method.
NOT_BITWISE = {"seconds", "stats_bytes", "log_sums"}


def digits(part: slice) -> dict[str, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels[part] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return {"images": images, "labels": labels[part].astype(np.int64)}


def write_config(folder: Path, **changes: Any) -> None:
    """Write the tiny config with `changes` and its images into `folder`."""
    np.savez(folder / "digits.npz", **digits(slice(100)))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **changes}))


def make_folder(folder: Path, epochs: tuple[int, ...] = (1, 2), **changes: Any) -> Path:
    """Write tiny.yaml, the images `digits.npz.d/` and checkpoints of fresh weights into `folder`, and return it."""
    folder.mkdir(exist_ok=True)
    write_config(folder, **{"dataset": "digits.npz.d", "linear": LINEAR, **changes})
    parts = folder / "digits.npz.d"
    parts.mkdir(exist_ok=True)
    for split, part in (("train", slice(TRAIN)), ("test", slice(TRAIN, TRAIN + TEST))):
        np.savez(parts / f"{split}.npz", **digits(part), classes=[str(c) for c in range(10)])
    config = read_config(folder / "tiny.yaml", [f"save_dir={folder / 'out'}"])
    for epoch in epochs:
        torch.manual_seed(epoch)
        net = make_network(config)
        path = checkpoint_path(config, epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_model(path, net, net, 1, torch.optim.Adam(net.parameters()), config, epoch)
    return folder


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


def call_in(folder: Path, module: ModuleType, *flags: str) -> None:
    """Run a script's main in this process on the CPU with the tiny config."""
    call(module, "--config=tiny.yaml", "--device=cpu", *flags, folder=folder)


def train_in(folder: Path, *flags: str) -> None:
    call_in(folder, train, *flags)


def sample_in(folder: Path, *flags: str) -> None:
    call_in(folder, sample, *flags)


def checkpoint(folder: Path) -> dict[str, Any]:
    """Return what the run in `folder`/out saved to be continued, without what depends on the clock."""
    content = read_checkpoint(folder / "out" / "checkpoint.pt")
    return {key: value for key, value in content.items() if key not in NOT_BITWISE}


def model(folder: Path, epoch: int) -> dict[str, Any]:
    return read_checkpoint(folder / "out" / "ckpts" / f"model_{epoch}.pth")


def result(path: Path) -> dict[str, Any]:
    """Return a result.json without what depends on the clock."""
    content = json.loads((path / "result.json").read_text(encoding="utf-8"))
    content.pop("seconds", None)
    return content


def killed(folder: Path, script: str, *flags: str, at: int = 0, in_preview: bool = False) -> None:
    """Run a script in a process of its own that saves after every step and is killed after step `at`, or in_preview:
    while it writes the picture of an epoch."""
    process = clean_process(_child, folder, script, flags, at, in_preview)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _child(folder: Path, script: str, flags: tuple[str, ...], at: int, in_preview: bool) -> None:
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    after = Run._after_step

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fatal(run: Run, total: int) -> None:
        if run.step > at:
            die()
        run.save_seconds = 0.0
        after(run, total)

    if in_preview:
        training.write_sheet = die
    else:
        Run._after_step = fatal
    call(importlib.import_module(script), *flags, folder=folder)
