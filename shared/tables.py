"""A table of a paper as a command: the runs it needs are run or continued, aggregated and compared with print.

    python -m TorchSSL.tables cifar10 --list              # the runs, what is done, hours still needed
    python -m TorchSSL.tables cifar10 --only fixmatch     # run what is missing, write table.md, .csv, .json and .png
    python -m TorchSSL.tables cifar10 --scale tiny        # the same machinery on the digits, in minutes

A paper's `tables.py` holds tables as data (Table, Cell, Job, Stage) and calls `serve`. Each run has a folder
`<out>/<table>-<scale>/<job>/seed_<s>` with `run.json`: its commands, configuration, commit, hardware and result. The
same command again reuses what is finished and continues what is not. Several of them may work on one folder at a time:
a run is held by a lock that lives as long as the process that computes it.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shared.cli import Parser, UserError, nearest, run_main
from shared.files import make_dir
from shared.hardware import machine
from shared.progress import duration
from shared.table_report import write_table
from shared.table_runs import (
    Cell,
    Job,
    Printed,
    Stage,
    Table,
    Task,
    Values,
    estimate,
    hold,
    run_tasks,
    submit,
)

__all__ = ["Cell", "Job", "Printed", "Stage", "Table", "Values", "main", "serve"]


def options_of(tables: Mapping[str, Callable[[str, argparse.Namespace], Table]], argv: Sequence[str] | None,
               add_flags: Callable[[argparse.ArgumentParser], None] | None) -> argparse.Namespace:
    parser = Parser(description="Run, aggregate and compare a table of the paper. Tables: " + ", ".join(tables))
    parser.add_argument("table", nargs="?", help="which one; without it they are listed")
    parser.add_argument("--scale", choices=("paper", "tiny"), default="paper",
                        help="tiny: the digits and short runs, to try everything out in minutes [paper]")
    parser.add_argument("--out", type=Path, default=Path("tables"), metavar="DIR", help="folder of the runs [./tables]")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="the data sets [./data]")
    parser.add_argument("--seeds", type=int, default=None, metavar="N", help="the first N seeds only [the paper's]")
    parser.add_argument("--only", default="", metavar="TEXT,...", help="rows or columns that contain one of these")
    parser.add_argument("--list", action="store_true", help="only list the runs with their state and the hours needed")
    parser.add_argument("--no-estimate", action="store_true", help="do not time a few steps before the runs")
    parser.add_argument("--aggregate", action="store_true", help="run nothing; write the table of what there is")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, without --gpus [1]")
    parser.add_argument("--gpus", default="", metavar="0,1,...", help="one run at a time on each of these")
    parser.add_argument("--slurm", default=None, metavar="PARTITION", help="every run as a SLURM job (submitit)")
    parser.add_argument("--slurm-hours", type=float, default=48.0, metavar="H", help="time limit of a SLURM job [48]")
    parser.add_argument("--slurm-gpus", type=int, default=1, metavar="N", help="GPUs of a SLURM job [1]")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help=argparse.SUPPRESS)
    parser.add_argument("--run", default=None, metavar="JOB/seed_S", help="only this run; what a SLURM job calls")
    if add_flags:
        add_flags(parser)
    options = parser.parse_args(argv)
    if options.table is not None and options.table not in tables:
        raise UserError(f"no table {options.table}{nearest(options.table, tables)}; there are: {', '.join(tables)}")
    if options.jobs < 1 or (options.seeds is not None and options.seeds < 1):
        raise UserError("--jobs and --seeds must be at least 1")
    return options


def selected(table: Table, only: str) -> Table:
    """Return the table with the rows and columns whose name contains one of the words."""
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    cells = tuple(cell for cell in table.cells
                  if not words or any(word in f"{cell.row} {cell.column}".lower() for word in words))
    if not cells:
        raise UserError(f"--only {only}: the table {table.name} has no such row or column; rows: "
                        f"{', '.join(dict.fromkeys(cell.row for cell in table.cells))}")
    return replace(table, cells=cells)


def main(module: str, tables: Mapping[str, Callable[[str, argparse.Namespace], Table]],
         add_flags: Callable[[argparse.ArgumentParser], None] | None = None, argv: Sequence[str] | None = None) -> None:
    """Serve `python -m <module> TABLE ...`; `tables`: name -> function of (scale, options) that returns the table."""
    options = options_of(tables, argv, add_flags)
    options.out, options.data_dir = options.out.resolve(), options.data_dir.resolve()
    if options.table is None:
        for name, make in tables.items():
            print(f"{name:24s} {make(options.scale, options).title}")
        return
    whole = tables[options.table](options.scale, options)
    table = selected(whole, options.only)
    folder = make_dir(options.out / f"{table.name}-{options.scale}")
    seeds = table.seeds[:options.seeds]
    tasks = [Task(job, seed, folder / job.name / f"seed_{seed}", options.data_dir)
             for job in table.jobs() for seed in seeds]
    if options.run is not None:
        tasks = [task for task in tasks if task.name == options.run]
        if not tasks:
            raise UserError(f"--run {options.run}: the table {table.name} has no such run")
    open_tasks = [task for task in tasks if not task.finished()]
    if options.list or not (options.aggregate or options.no_estimate or options.run or not open_tasks):
        show(table, tasks, folder, timed=not options.no_estimate)
    failed: list[str] = []
    if not (options.list or options.aggregate):
        if options.slurm is not None and options.run is None:  # with --run we are inside such a job
            failed = submit(open_tasks, ["-m", module, *(sys.argv[1:] if argv is None else argv)], options)
        else:
            cards = [card for card in options.gpus.split(",") if card]
            threads = os.environ.get("OMP_NUM_THREADS", str(max(1, machine()["cores"] // options.jobs)))
            slots = [{"CUDA_VISIBLE_DEVICES": card} for card in cards] or [{"OMP_NUM_THREADS": threads}] * options.jobs
            failed = run_tasks(open_tasks, slots)
    if not (options.list or options.run):
        lock = hold(folder, wait=True)  # two of these commands that end at a time write one after the other
        print(write_table(whole, options.scale, folder, seeds, options.data_dir))
        os.close(lock)
    if failed:
        raise UserError(f"{len(failed)} of {len(open_tasks)} runs failed; the same command tries again. {failed[0]}")


def show(table: Table, tasks: Sequence[Task], folder: Path, timed: bool) -> None:
    """Print every run with its state, and the hours that are still needed on this machine."""
    missing = [task for task in tasks if not task.finished()]
    jobs = list({task.job.name: task.job for task in missing}.values())
    seconds = estimate(jobs, folder / "estimates.json", tasks[0].data_dir) if timed else {}
    for task in tasks:
        state = task.record().get("state", "not run")
        needed = f", about {duration(seconds[task.job.name])}" if task in missing and task.job.name in seconds else ""
        print(f"{task.name}: {state}{needed}")
    if seconds:
        total = sum(seconds.get(task.job.name, 0.0) for task in missing)
        found = machine()
        print(f"{table.title}: {len(missing)} of {len(tasks)} runs are missing, about {total / 3600:.3g} hours of "
              f"{found['hardware']}, estimated from a few steps")


def serve(module: str, tables: Mapping[str, Callable[[str, argparse.Namespace], Table]],
          add_flags: Callable[[argparse.ArgumentParser], None] | None = None) -> None:
    """Run `main` as a program."""
    run_main(lambda: main(module, tables, add_flags))
