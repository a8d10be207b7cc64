"""From a script's option dictionary to its training run: the processes agree, the folder is chosen and held."""
from __future__ import annotations

import glob
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import IO, Any, TypeVar

import torch

from EDM.training.config import batch_rounds, choose_folder, is_finished, write_options
from EDM.training.dataset import TrainingSet
from EDM.training.published import local_file
from EDM.training.stats import TickSchedule
from EDM.training.training_loop import Denoising, network_table, training_loop
from shared import distributed
from shared.cli import UserError
from shared.distributed import World
from shared.training.files import lock
from shared.training.fingerprint import fingerprint_arrays, fingerprints

Plan = TypeVar("Plan")


def check(flags: SimpleNamespace) -> None:
    """Settle --precision; raise UserError for flags that contradict each other."""
    if flags.transfer is not None and flags.resume is not None:
        raise UserError("--transfer and --resume cannot be specified at the same time")
    if flags.transfer is not None and not re.match(r"https?://", flags.transfer) and not flags.dry_run \
            and not os.path.isfile(flags.transfer):
        raise UserError(f"--transfer: no such file: {flags.transfer}")
    if flags.precision not in (None, "fp16") and flags.fp16:
        raise UserError(f"--fp16=1 and --precision={flags.precision} contradict each other; give one of them")
    if flags.ema_sigma_rel is not None and flags.ema_rampup is not None:
        raise UserError("--ema-rampup belongs to the half-life of --ema; leave it out with --ema-sigma-rel")
    if getattr(flags, "label_dropout", None) and not flags.cond:
        raise UserError("--label-dropout needs a class-conditional model: add --cond=1")
    rampup = 10000 if flags.lr_rampup is None else flags.lr_rampup
    if flags.duration * 1000 < rampup and not flags.dry_run and int(os.environ.get("RANK", 0)) == 0:
        warnings.warn(f"--duration: {flags.duration:g} million images end within the warm-up of the learning rate, "
                      f"{rampup:g} thousand images long: --lr is never reached; give a shorter --lr-rampup",
                      stacklevel=2)
    if flags.strict and flags.compile:
        raise UserError("--strict and --compile=1 contradict each other; give one of them")
    if flags.precision == "fp16":
        flags.fp16, flags.precision = True, None
    # An explicit --fp16=0 means fp32; by default the device decides.
    flags.arithmetic = flags.precision or ("fp16" if flags.fp16 else "fp32" if "fp16" in flags.given else None)


def foresee_denoiser(flags: SimpleNamespace, dataset: TrainingSet, options: Mapping[str, Any], processes: int) -> int:
    """Return the bytes that the training of a denoiser writes at least; UserError for an error at its start.

    options: the option dictionary for `dataset`; only its size and number of classes count.
    """
    part, _ = batch_rounds(flags.batch, flags.batch_gpu, processes)
    with torch.device("meta"):
        net = Denoising(options, dataset, World(device=torch.device("meta"))).net
        network_table(net, part)
    schedule = TickSchedule(flags.batch, options["total_kimg"], flags.tick, flags.snap, flags.dump)
    ticks = 1 + options["total_kimg"] // flags.tick
    # A snapshot holds the average; the state and the two checkpoints hold network, average and moments.
    copies = 2 + ticks // schedule.snapshot_ticks + 4 * (2 + ticks // schedule.state_dump_ticks)
    return copies * sum(4 * value.numel() for value in net.parameters())


def join(flags: SimpleNamespace, plan: Callable[[], Plan]) -> tuple[World, Plan]:
    """Join the other processes, and return this one's world and the result of `plan`.

    The main process plans first, and the others wait for it: they find its decoded images in the cache. A UserError of
    it is reported once. With --dry-run each process is alone.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    planned, error = None, None
    if rank == 0:
        try:
            if not flags.dry_run:
                batch_rounds(flags.batch, flags.batch_gpu, size)
            planned = plan()
        except UserError as mistake:
            if size == 1 or flags.dry_run:
                raise
            error = mistake
    if flags.dry_run:
        return World(rank, size), planned or plan()

    def report() -> None:
        if error is not None:
            raise error

    world = distributed.start(flags.device)
    distributed.on_main(report, world)
    return world, planned if world.main else plan()


def launch(options: dict[str, Any], dataset: TrainingSet, make_method: Callable[..., Denoising], flags: SimpleNamespace,
           world: World) -> None:
    """Train `make_method(options, dataset, world)` in the run's folder, which is made, continued or found complete.

    With --dry-run, print the options only.
    """
    held: list[IO] = []  # the folder's lock, until the run holds it as well

    def prepare() -> tuple[dict[str, Any], dict[str, str], bool] | None:
        """Return the options with the run's folder, the fingerprints of the inputs, and whether the folder is new; None
        if nothing is left to do."""
        transfer = None if flags.transfer is None or flags.dry_run else local_file(flags.transfer)
        inputs = fingerprints({"--data": fingerprint_arrays(dataset.images, dataset.raw_labels),
                               "--transfer": transfer, "--resume": flags.resume,
                               "--eval-data": getattr(flags, "eval_data", None)})
        folder, continued = choose_folder(flags, options, inputs, world.size)
        options["run_dir"] = folder
        if is_finished(folder) and not flags.dry_run:
            print(f"complete: {folder}")
            return None
        print_options(options, flags, world.size)
        if flags.dry_run:
            print("Dry run; exiting.")
            return None
        print(continued or "Creating output directory...", flush=True)
        is_new = not os.path.exists(folder)
        held.append(lock(folder))
        write_options(folder, options, inputs)
        return options, inputs, is_new

    if flags.dry_run:
        if world.main:
            prepare()
        return
    prepared = distributed.on_main(prepare, world)
    if prepared is not None:
        options, inputs, is_new = prepared
        try:
            training_loop(options, dataset, world, make_method, inputs=inputs, precision=flags.arithmetic,
                          strict=flags.strict, compiled=flags.compile,
                          checkpoint_seconds=flags.checkpoint_seconds)
        except UserError:
            nothing_trained = not glob.glob(os.path.join(glob.escape(options["run_dir"]), "*.p[tk]*"))
            if world.main and is_new and nothing_trained:
                shutil.rmtree(options["run_dir"], ignore_errors=True)
            raise
    distributed.stop()


def print_options(options: Mapping[str, Any], flags: SimpleNamespace, world_size: int) -> None:
    print("\nTraining options:")
    print(json.dumps(options, indent=2))
    print(f"""
Output directory:        {options['run_dir']}
Dataset path:            {options['dataset_kwargs']['path']}
Class-conditional:       {options['dataset_kwargs']['use_labels']}
Network architecture:    {flags.arch}
Preconditioning & loss:  {flags.precond}
Number of GPUs:          {world_size}
Batch size:              {options['batch_size']}
Mixed-precision:         {options['network_kwargs']['use_fp16']}
""", flush=True)
