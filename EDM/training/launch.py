"""From flags to a training run: check them, agree with the other processes, prepare the folder, train."""
from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from shared.cli import UserError

if TYPE_CHECKING:
    from EDM.training.dataset import TrainingSet

COMPLETE = "complete"


class Script(NamedTuple):
    """What one training script brings along.

    open_data(flags) -> the training set. option_dictionary(flags, dataset, seed) -> the published option dictionary
    without run_dir. make_task() -> what `EDM.training.training_loop.train` makes its task by; called once torch may
    be imported.
    """

    open_data: Callable[[SimpleNamespace], TrainingSet]
    option_dictionary: Callable[[SimpleNamespace, TrainingSet, int], dict[str, Any]]
    make_task: Callable[[], Callable[..., Any]]


def run(script: Script, flags: SimpleNamespace) -> None:
    """Train as the flags say, or print what they mean (--dry-run). Raises UserError."""
    check(flags)
    if flags.precision == "fp16":
        flags.fp16, flags.precision = True, None
    # --fp16=0 in so many words asks for fp32, where saying nothing leaves the choice to the device.
    flags.arithmetic = flags.precision or ("fp16" if flags.fp16 else "fp32" if "fp16" in flags.given else None)
    if flags.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            world_size = int(os.environ.get("WORLD_SIZE", 1))
            options, _, _ = plan(script, flags, world_size)
            print_options(options, flags, world_size)
            print("Dry run; exiting.")
        return
    launch(script, flags)


def check(flags: SimpleNamespace) -> None:
    """Raise UserError for flags that contradict each other."""
    if flags.transfer is not None and flags.resume is not None:
        raise UserError("--transfer and --resume cannot be specified at the same time")
    if flags.transfer is not None and not re.match(r"https?://", flags.transfer) and not flags.dry_run \
            and not os.path.isfile(flags.transfer):
        raise UserError(f"--transfer: no such file: {flags.transfer}")
    if flags.precision not in (None, "fp16") and flags.fp16:
        raise UserError(f"--fp16=1 and --precision={flags.precision} contradict each other; give one of them")
    if flags.ema_sigma_rel is not None and flags.ema_rampup is not None:
        raise UserError("--ema-rampup belongs to the half-life of --ema; leave it out with --ema-sigma-rel")
    if flags.label_dropout and not flags.cond:
        raise UserError("--label-dropout needs a class-conditional model: add --cond=1")
    if flags.strict and flags.compile:
        raise UserError("--strict and --compile=1 contradict each other; give one of them")


def plan(script: Script, flags: SimpleNamespace, world_size: int) -> tuple[dict[str, Any], str | None, TrainingSet]:
    """Return the option dictionary with the run's folder, a line if a run is taken up again, and the training set."""
    import secrets

    from EDM.training.config import choose_folder

    dataset = script.open_data(flags)
    seed = secrets.randbelow(1 << 31) if flags.seed is None else flags.seed
    options = script.option_dictionary(flags, dataset, seed)
    options["run_dir"], continued = choose_folder(flags, options, world_size)
    return options, continued, dataset


def open_data(path: str, use_labels: bool, xflip: bool) -> TrainingSet:
    """Open the training set; raise UserError if it cannot be read or has none of the labels that are needed."""
    from EDM.training.dataset import open_training_set

    try:
        dataset = open_training_set(path, use_labels=use_labels, xflip=xflip)
    except (OSError, UserError) as error:
        message = str(error)
        raise UserError(message if message.startswith("--data") else f"--data: {message}") from None
    if use_labels and not dataset.label_dim:
        raise UserError("--cond=True requires labels specified in dataset.json; "
                        f"{path} has none: add them, or train with --cond=0")
    return dataset


def print_options(options: dict[str, Any], flags: SimpleNamespace, world_size: int) -> None:
    from EDM.training.config import summary

    print("\nTraining options:")
    print(json.dumps(options, indent=2))
    print("\n" + "\n".join(summary(options, flags, world_size)) + "\n", flush=True)


def launch(script: Script, flags: SimpleNamespace) -> None:
    """Agree with the other processes on what to do, prepare the folder, and train."""
    from EDM.training.config import batch_rounds

    world_size, dataset, agreed = int(os.environ.get("WORLD_SIZE", 1)), None, None
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            batch_rounds(flags.batch, flags.batch_gpu, world_size)
            options, continued, dataset = plan(script, flags, world_size)
        except UserError as error:
            agreed = error
    if isinstance(agreed, UserError) and world_size == 1:
        raise agreed  # before torch is imported

    from shared import distributed

    world = distributed.start(flags.device)
    held, new = None, False
    if world.main and agreed is None:
        new = not os.path.exists(options["run_dir"])
        try:
            agreed, held = prepare(options, continued, flags, world_size)
        except UserError as error:
            agreed = error
    agreed = distributed.broadcast_value(agreed, world)
    if isinstance(agreed, UserError):
        distributed.stop()
        if world.main:
            raise agreed
        sys.exit(agreed.status)
    if agreed != COMPLETE:
        from EDM.training.training_loop import train

        if dataset is None:  # rank 0 has decoded it by now
            dataset = script.open_data(flags)
        try:
            with held or contextlib.nullcontext():
                train(agreed, dataset, world, script.make_task(), precision=flags.arithmetic, strict=flags.strict,
                      compiled=bool(flags.compile), checkpoint_seconds=flags.checkpoint_seconds)
        except UserError:
            if new and not glob.glob(os.path.join(glob.escape(agreed["run_dir"]), "*.p[tk]*")):
                shutil.rmtree(agreed["run_dir"], ignore_errors=True)  # nothing was trained in it
            raise
    distributed.stop()


def prepare(options: dict[str, Any], continued: str | None, flags: SimpleNamespace,
            world_size: int) -> tuple[dict[str, Any] | str, IO | None]:
    """Make the run's folder; return the options (COMPLETE where nothing is left to do) and the lock on the folder."""
    from EDM.training.config import is_finished, write_options
    from shared.training.files import lock

    folder = options["run_dir"]
    if is_finished(folder):
        print(f"{folder} is already complete: see {os.path.join(folder, 'network-snapshot-latest.pkl')}")
        return COMPLETE, None
    print_options(options, flags, world_size)
    print(continued or "Creating output directory...", flush=True)
    held = lock(folder)
    write_options(folder, options)
    return options, held
