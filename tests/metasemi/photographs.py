"""A tiny ImageNet for tests: small JPEG files cut out of two photographs, packed by the README's commands."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from MetaSemi import train_imagenet, train_meta_imagenet
from MetaSemi.imagenet import im2rec, split_imagenet
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.shared.clean import clean_process

SCRIPTS = {"meta": train_meta_imagenet, "baseline": train_imagenet}
CLASSES = ("n01440764", "n01443537", "n01484850")
TRAIN, VAL = 8, 5  # images of each class
# What a run measures of the machine and not of the method.
NOT_BITWISE = {"seconds", "stats_bytes", "log_sums"}
TINY = ("-a shufflenet_v2_x0_5 --num-classes 3 --batch-size 4 --imcrop 32 --imsize 36 --epochs 3 --warmup 1 --lr 0.05 "
        "--workers 1 --print-freq 2 --device cpu").split()


@cache
def _photographs() -> list[np.ndarray]:
    return load_sample_images().images


def make_tree(folder: Path, per_class: int = TRAIN) -> Path:
    """Write train/<wnid>/ and val/<wnid>/ with photographs of unequal sizes below `folder`."""
    rng = np.random.default_rng(0)
    for part, count in (("train", per_class), ("val", VAL)):
        for wnid in CLASSES:
            (folder / part / wnid).mkdir(parents=True)
            for number in range(count):
                whole = _photographs()[int(rng.integers(2))]
                height, width = rng.integers(36, 90, 2)
                top, left = (int(rng.integers(side - length)) for side, length in zip(
                    whole.shape, (height, width), strict=False))
                name = f"{wnid}_{number}.JPEG" if part == "train" else f"ILSVRC2012_val_{wnid}_{number}.JPEG"
                Image.fromarray(whole[top:top + height, left:left + width]).save(folder / part / wnid / name, "JPEG")
    return folder


def call(script: Any, *args: str | Path) -> None:
    """Run a script's main in this process with these arguments."""
    before = sys.argv
    sys.argv = [script.__name__, *map(str, args)]
    try:
        script.main()
    finally:
        sys.argv = before


def pack(folder: Path, per_class: int = 3) -> Path:
    """Do what the README does with a tree: split it and pack the nine files into `folder`, which is returned."""
    call(split_imagenet, "--data-path", folder, "--list-path", folder / "lists", "--per-class", per_class)
    for name, part in (("train_label", "labeled"), ("train_unlabel", "unlabeled"), ("val", "val")):
        shuffle = ["--no-shuffle"] if name == "val" else []
        call(im2rec, folder / name, folder / part, "--recursive", "--list", "--num-thread", "2")
        call(im2rec, folder / name, folder / part, "--recursive", "--pass-through", "--pack-label", *shuffle,
             "--num-thread", "2")
    return folder


def train(name: str, data: Path, *extra: str) -> None:
    """Run a training ("meta" or "baseline") in this process with the tiny settings, into ./run."""
    call(SCRIPTS[name], *TINY, "--data", data, "--save-path", "run", *extra)


def _child(name: str, folder: Path, data: Path, extra: tuple[str, ...], sabotage: Callable[[], None] | None) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = open(folder / "stdout.txt", "a", buffering=1)  # noqa: SIM115 - until the process ends
    sys.stderr = open(folder / "stderr.txt", "a", buffering=1)  # noqa: SIM115
    if sabotage is not None:
        sabotage()
    try:
        train(name, data, *extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)


def run(name: str, folder: Path, data: Path, *extra: str, status: int = 0,
        sabotage: Callable[[], None] | None = None) -> None:
    """Run a training in `folder` in a process of its own and check the exit status (-9: killed)."""
    folder.mkdir(exist_ok=True)
    process = clean_process(_child, name, folder, data, extra, sabotage)
    process.start()
    process.join(1800)
    assert process.exitcode == status, (process.exitcode, (folder / "stderr.txt").read_text()[-2000:])


def checkpoint(folder: Path, name: str = "checkpoint.pth") -> dict[str, Any]:
    """Return what the run in `folder` saved, without what depends on the clock."""
    content = read_checkpoint(folder / "run" / name)
    return {key: value for key, value in content.items() if key not in NOT_BITWISE}
