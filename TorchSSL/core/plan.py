"""Checks of a whole experiment before its first stage: flags, sizes, labels, files, room on the disk.

An experiment is the commands that `run_all.sh --dry-run` prints. A script whose needs depend on the images has a
function `foresee(options, images, processes)`, which raises UserError and returns the bytes that it is going to write.
"""
from __future__ import annotations

import importlib
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from shared import cli
from shared.augment.views import WeakPolicy, draw_weak
from shared.cli import UserError
from shared.data.classes import class_folders
from shared.data.images import ImageSet, UnequalSizes
from TorchSSL.core.data import load_pools, load_training_data
from TorchSSL.core.networks import make_network

ROOT = Path(__file__).resolve().parents[2]
GIGABYTE = 1 << 30
MULTIPLE = 4  # of the sides that stage 2 takes
STEPS_WITHOUT_SCRIPT = ("cd", "export")
# Folders that the commands write, as the flags that name them.
OUTPUTS = ("--outdir", "--save_dir", "--save_path", "--out", "--dest")


@dataclass(frozen=True)
class Command:
    """One command of an experiment: the folder it is typed in, its script, its words, and its processes."""

    folder: Path
    script: str
    words: list[str]
    processes: int

    @property
    def module(self) -> ModuleType:
        if self.script == "dataset_tool.py":  # the one of TorchSSL/ is that of EDM/
            return importlib.import_module("EDM.dataset_tool")
        return importlib.import_module(f"{self.folder.name}.{Path(self.script).stem}")

    def read(self) -> SimpleNamespace | None:
        """Return the options as the script itself reads them; UserError. None for a script that declares none."""
        module = self.module
        read = getattr(module, "parse", None)
        if read is None:
            return None
        return cli.parse(module.__doc__, module.FLAGS, self.words) if read is cli.parse else read(self.words)


def commands_in(lines: Iterable[str]) -> Iterator[Command]:
    """Yield the commands of our scripts among printed lines."""
    folder = ROOT
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["cd"]:
            folder = (folder / words[1]).resolve()
            continue
        position = next((i for i, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
        if position is None or words[0] in STEPS_WITHOUT_SCRIPT:
            continue
        processes = next((int(word.partition("=")[2]) for word in words[:position]
                          if word.startswith("--nproc_per_node=")), 1)
        script, flags = words[position], words[position + 1:]
        if script == "generate.sh":
            last, images, snapshot, count, *flags = flags
            script, processes = "generate.py", int(count)
            flags = [f"--seeds=0-{last}", f"--outdir={images}", f"--network={snapshot}", "--classes=all", *flags]
        if ">>" in flags:
            flags = flags[:flags.index(">>")]
        yield Command(folder, script, flags, processes)


def check_experiment(lines: Iterable[str]) -> None:
    """Check the commands of an experiment as far as that is possible before the first; UserError names the script.

    Flags are read by each script's own declarations. The images of a data set that is there are read, and cached, as
    stage 1 would; those of one that has yet to be fetched or resized are known by their size alone.
    """
    commands, images, needed = list(commands_in(lines)), None, 0
    read = [_understood(command) for command in commands]
    for command, options in zip(commands, read, strict=True):
        os.chdir(command.folder)
        try:
            if command.script == "dataset_tool.py" and options.resolution is not None:
                images = images or resized(options)
            elif is_learner(command, options):
                images = images or images_of(options)
                check_learner(options, images)
            elif images is not None and hasattr(command.module, "foresee"):
                check_sides(images)
                needed += command.module.foresee(options, images, command.processes)
        except UserError as error:
            raise UserError(f"{command.script}: {error}") from None
    check_outputs(commands, needed)


def _understood(command: Command) -> SimpleNamespace | None:
    os.chdir(command.folder)
    try:
        return command.read()
    except UserError as error:
        raise UserError(f"{command.script}: {error}") from None


def is_learner(command: Command, options: Any) -> bool:
    return command.folder.name == "TorchSSL" and hasattr(options, "num_train_iter")


# -------------------------------------------------------------------------------------------------------------- images

def images_of(options: SimpleNamespace) -> ImageSet | None:
    """Return the training images of a learner's data set, having checked all of it; None if it is not there yet, or an
    empty folder is in its place."""
    place = Path(options.dataset)
    if place.is_dir() and not any(place.iterdir()):
        return None
    try:
        load_pools(options.dataset, options.data_dir, download=False)
    except UnequalSizes as error:
        raise UserError(f"{str(error).partition(';')[0]}; give --resolution=64x64 --transform=center-crop to make them "
                        "equal") from None
    except UserError:
        if os.path.exists(options.dataset):
            raise
        return None  # to be fetched
    # Labelled images that an earlier stage chooses are not known yet, and need not be equally many of every class.
    chosen = {"label_idx": None, "num_labels": 0} if options.label_idx else {}
    data = load_training_data(SimpleNamespace(**{**vars(options), "aug_path": None, **chosen}),
                              Path(options.save_dir) / options.save_name)
    images = data.unlabeled
    return replace(images, name=f"--dataset {options.dataset}") if isinstance(images, ImageSet) else None


def resized(options: SimpleNamespace) -> ImageSet:
    """Return a blank set of the size and the classes that dataset_tool.py will write."""
    width, height = options.resolution
    if options.transform == "center-crop-wide":
        height = width
    if width != height or width & (width - 1):
        raise UserError(f"--resolution={width}x{height}: stage 2 takes squares whose side is a power of two, such as "
                        f"--resolution={(side := 1 << (min(width, height).bit_length() - 1))}x{side}")
    source = Path(options.source)
    classes = tuple(class_folders(source)) if source.is_dir() else ()
    return blank(3, width, classes or ("0", "1"))


def blank(channels: int, side: int, classes: tuple[str, ...]) -> ImageSet:
    count = len(classes)
    return ImageSet(np.zeros((count, channels, side, side), np.uint8), np.arange(count), classes, "images")


def check_sides(images: ImageSet) -> None:
    """Raise UserError for images that stage 2 does not take."""
    height, width = images.size
    if height == width and not height % MULTIPLE:
        return
    side = 1 << (min(height, width).bit_length() - 1)
    raise UserError(f"{images.name}: the images are {width}x{height}, stage 2 takes squares whose side is a multiple "
                    f"of {MULTIPLE}; give --resolution={side}x{side}" + " --transform=center-crop" * (height != width))


def check_learner(options: SimpleNamespace, images: ImageSet | None) -> None:
    """Raise UserError for a network or views that do not go with the images."""
    if images is None:
        return
    with torch.device("meta"):
        make_network(vars(options), images.num_classes, images.channels)
    policy = WeakPolicy(options.weak_flip, options.weak_pad, options.weak_pad_mode, options.weak_subpixel, None)
    draw_weak(1, np.random.default_rng(0), images.size, policy)


# ---------------------------------------------------------------------------------------------------------- the outputs

def check_outputs(commands: Iterable[Command], needed: int) -> None:
    """Raise UserError for a place that cannot be written to, or a disk with less room than `needed` bytes."""
    for command in commands:
        for word in command.words:
            flag, _, path = word.partition("=")
            if flag not in OUTPUTS or not path:
                continue
            place = nearest_folder(command.folder / path)
            if place.exists() and not place.is_dir():
                raise UserError(f"{flag}={path}: {place} is a file; choose another --out")
            if not os.access(place, os.W_OK | os.X_OK):
                raise UserError(f"{flag}={path}: cannot write into the folder {place}; choose another --out")
            if command.script in ("train.py", "train_noise.py"):
                free = shutil.disk_usage(place).free
                if free < needed:
                    raise UserError(f"the snapshots, checkpoints and images of stage 2 take about "
                                    f"{needed / GIGABYTE:.0f} GB, {place} has {free / GIGABYTE:.0f} GB left; choose "
                                    "another --out, or write fewer snapshots with --stage2-args=--snap=500")


def nearest_folder(path: Path) -> Path:
    """Return the nearest existing path at or above `path`; above it if it is a file to be replaced."""
    path = path.resolve()
    if path.is_file():
        return path.parent
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
