"""What the evaluation scripts are tried on: a config, checkpoints of fresh weights, a small part of the digits."""
from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from DDAE.ddae.checkpoints import checkpoint_path, write_model
from DDAE.ddae.config import make_network, read_config
from tests.ddae.tiny import call, write_config
from tests.shared.clean import clean_process

LINEAR = {"n_epoch": 2, "batch_size": 20, "lrate": 1.0e-2, "timestep": 4, "blockname": "out_2", "flip": False, "pad": 1}
TRAIN, TEST = 50, 23    # neither is shared evenly by two processes or by whole batches


def make_folder(folder: Path, epochs: tuple[int, ...] = (1, 2), **changes: Any) -> Path:
    """Write tiny.yaml, the images `digits/` and checkpoints of some epochs into `folder`, and return it."""
    folder.mkdir(exist_ok=True)
    write_config(folder, **{"dataset": "digits.npz.d", "linear": LINEAR, **changes})
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    parts = folder / "digits.npz.d"
    parts.mkdir(exist_ok=True)
    for split, part in (("train", slice(TRAIN)), ("test", slice(TRAIN, TRAIN + TEST))):
        np.savez(parts / f"{split}.npz", images=images[part], labels=labels[part].astype(np.int64),
                 classes=[str(c) for c in range(10)])
    config = read_config(folder / "tiny.yaml", [f"save_dir={folder / 'out'}"])
    for epoch in epochs:
        torch.manual_seed(epoch)
        net = make_network(config)
        path = checkpoint_path(config, epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_model(path, net, net, 1, torch.optim.Adam(net.parameters()), config, epoch)
    return folder


def call_in(folder: Path, module: ModuleType, *flags: str) -> None:
    """Run a script's main in this process on the CPU with the tiny config."""
    call(module, "--config=tiny.yaml", "--device=cpu", *flags, folder=folder)


def result(path: Path) -> dict[str, Any]:
    """Return a result.json without what depends on the clock."""
    content = json.loads((path / "result.json").read_text(encoding="utf-8"))
    content.pop("seconds", None)
    return content


def _child(folder: Path, module: ModuleType, flags: tuple[str, ...], step: int) -> None:
    from shared.training.run import Run

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    after = Run._after_step

    def fatal(run: Run, total: int) -> None:
        if run.step > step:
            os.kill(os.getpid(), signal.SIGKILL)
        run.save_seconds = 0.0
        after(run, total)

    Run._after_step = fatal
    call(module, *flags, folder=folder)


def killed(folder: Path, module_name: str, *flags: str, at: int) -> None:
    """Run a script in a process of its own that saves after every step and is killed after step `at`."""
    process = clean_process(_named, folder, module_name, flags, at)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _named(folder: Path, module_name: str, flags: tuple[str, ...], at: int) -> None:
    import importlib

    _child(folder, importlib.import_module(module_name), flags, at)
