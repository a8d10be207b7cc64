"""A table of a paper as a command: the runs it needs are run or continued, aggregated and compared with print.

    python -m TorchSSL.tables cifar10 --list              # the runs, what is done, hours still needed
    python -m TorchSSL.tables cifar10 --only fixmatch     # run what is missing, write table.md, .csv, .json and .png
    python -m TorchSSL.tables cifar10 --scale tiny        # the same machinery on the digits, in minutes

A paper's `tables.py` holds tables as data (Table, Cell, Job, Stage) and calls `serve`. Each run has a folder
`<out>/<table>-<scale>/<job>/seed_<s>` with `run.json`: its commands, configuration, commit, hardware and result (tables
that share runs have them in the folder `<out>/<Table.runs>`). The same command again reuses what is finished and
continues what is not. Several of them may work on one folder at a time: a run is held by a lock that lives as long as
the process that computes it.
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shared.cli import Parser, UserError, nearest, run_main
from shared.report.table_report import write_table
from shared.report.table_runs import (
    Cell,
    Job,
    Printed,
    Stage,
    Table,
    Task,
    Values,
    estimate,
    run_tasks,
    submit,
    untried,
)
from shared.training.files import lock, make_dir
from shared.training.hardware import machine
from shared.training.progress import duration

__all__ = ["Cell", "Job", "Printed", "Stage", "Table", "Values", "main", "serve"]


def options_of(paper: str, tables: Mapping[str, Callable[[str, argparse.Namespace], Table]], argv: Sequence[str] | None,
               add_flags: Callable[[argparse.ArgumentParser], None] | None) -> argparse.Namespace:
    parser = Parser(description="Run, aggregate and compare a table of the paper. Tables: " + ", ".join(tables))
    parser.add_argument("table", nargs="?", help="which one; without it they are listed")
    parser.add_argument("--scale", choices=("paper", "tiny"), default="paper",
                        help="tiny: the digits and short runs, to try everything out in minutes [paper]")
    parser.add_argument("--out", type=Path, default=Path("tables", paper), metavar="DIR",
                        help=f"folder of the runs [./tables/{paper}]")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="the data sets [./data]")
    parser.add_argument("--seeds", type=int, default=None, metavar="N", help="how many, fewer or more [the paper's]")
    parser.add_argument("--only", default="", metavar="TEXT,...", help="rows or columns that contain one of these")
    parser.add_argument("--list", action="store_true", help="only list the runs, with the hours needed")
    parser.add_argument("--no-estimate", action="store_true", help="do not time a few steps before the paper's runs")
    parser.add_argument("--aggregate", action="store_true", help="run nothing; write the table of what there is")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, without --gpus [1]")
    parser.add_argument("--gpus", default="", metavar="0,1,...", help="one run at a time on each of these")
    parser.add_argument("--slurm", default=None, metavar="PARTITION", help="every run as a SLURM job (submitit)")
    parser.add_argument("--slurm-hours", type=float, default=48.0, metavar="H", help="time limit of a SLURM job [48]")
    parser.add_argument("--slurm-gpus", type=int, default=1, metavar="N", help="GPUs of a SLURM job [1]")
    parser.add_argument("--slurm-args", default="", metavar='"KEY=VALUE ..."', help="further options of sbatch, for "
                        'instance "account=us cpus-per-task=8"')
    parser.add_argument("--slurm-restarts", type=int, default=20, metavar="N", help="how often a job that the time "
                        "limit ends goes on [20]")
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
    """Return the table with the rows and columns whose name contains one of the words, and the row to compare with."""
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    names = {cell: f"{cell.row} {cell.column}".lower() for cell in table.cells}
    for word in words:
        if not any(word in name for name in names.values()):
            raise UserError(f"--only {word}: the table {table.name} has no such row or column; rows: "
                            f"{', '.join(dict.fromkeys(cell.row for cell in table.cells))}")
    chosen = tuple(cell for cell, name in names.items()
                   if not words or cell.row == table.base or any(word in name for word in words))
    return replace(table, cells=chosen)


def main(module: str, tables: Mapping[str, Callable[[str, argparse.Namespace], Table]],
         add_flags: Callable[[argparse.ArgumentParser], None] | None = None, argv: Sequence[str] | None = None) -> None:
    """Serve `python -m <module> TABLE ...`; `tables`: name -> function of (scale, options) that returns the table."""
    options = options_of(module.partition(".")[0], tables, argv, add_flags)
    options.out, options.data_dir = options.out.resolve(), options.data_dir.resolve()
    if options.table is None:
        for name, make in tables.items():
            print(f"{name:24s} {make(options.scale, options).title}")
        return
    whole = tables[options.table](options.scale, options)
    table = selected(whole, options.only)
    own = f"{table.name}-{options.scale}"
    runs = options.out / (table.runs or own)
    folder = runs if table.runs == table.name else options.out / own
    seeds = table.first_seeds(options.seeds)
    tasks = [Task(job, seed, runs / job.name / f"seed_{seed}", options.data_dir)
             for job in table.jobs() for seed in seeds]
    if options.run is not None:
        tasks = [task for task in tasks if task.name == options.run]
        if not tasks:
            raise UserError(f"--run {options.run}: the table {table.name} has no such run")
    open_tasks = [task for task in tasks if not task.finished()]
    cards = [card for card in options.gpus.split(",") if card]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, machine()["cores"] // options.jobs)))
    slots = [{"CUDA_VISIBLE_DEVICES": card} for card in cards] or [{"OMP_NUM_THREADS": threads}] * options.jobs
    tiny = options.scale == "tiny"  # there the timing would take as long as the runs
    if options.list or not (options.aggregate or options.no_estimate or options.run or tiny or not open_tasks):
        show(table, tasks, make_dir(runs), slots, timed=not (options.no_estimate or tiny))
    failed: list[str] = []
    if not (options.list or options.aggregate):
        if options.run is not None and hasattr(signal, "SIGUSR2"):
            # A SLURM job gets it before its time is up; its first process asks for more, and SIGTERM ends the others.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if options.slurm is not None and options.run is None:
            failed = submit(open_tasks, ["-m", module, *(sys.argv[1:] if argv is None else argv)], options)
        else:
            failed = run_tasks(open_tasks, slots)
    if not (options.list or options.run):
        with lock(folder, wait=True):  # two of these commands that end at a time write one after the other
            print(write_table(whole, options.scale, folder, runs, seeds, options.data_dir))
    if failed:
        raise UserError(f"{len(failed)} of {len(open_tasks)} runs failed; the same command tries again. {failed[0]}")


def show(table: Table, tasks: Sequence[Task], runs: Path, slots: Sequence[Mapping[str, str]], timed: bool) -> None:
    """Print every run with its state, and the hours that are still needed on this machine; timed in the first slot."""
    missing = [task for task in tasks if not task.finished()]
    jobs = list({task.job.name: task.job for task in missing}.values())
    seconds = estimate(jobs, runs / "estimates.json", tasks[0].data_dir, slots[0]) if timed else {}
    for task in tasks:
        needed = f", about {duration(seconds[task.job.name])}" if task in missing and task.job.name in seconds else ""
        print(f"{task.name}: {task.state()}{needed}")
    if seconds:
        counted = [task for task in missing if task.job.name in seconds]
        total = sum(seconds[task.job.name] for task in counted)
        hardware = "one of " * ("CUDA_VISIBLE_DEVICES" in slots[0]) + machine()["hardware"]
        at_once = f" ({total / 3600 / len(slots):.3g} with {len(slots)} at a time)" * (len(slots) > 1)
        print(f"{table.title}: {len(missing)} of {len(tasks)} runs are missing, about {total / 3600:.3g} hours of "
              f"{hardware}{at_once}, estimated from a few steps")
        left_out = Counter(stage for task in counted for stage in untried(task.job))
        if len(counted) < len(missing) or left_out:
            print("not counted: " + ", ".join([f"{len(missing) - len(counted)} runs that could not be timed"] * (
                len(counted) < len(missing)) + [f"{stage} of {count} runs" for stage, count in left_out.items()]))


def serve(module: str, tables: Mapping[str, Callable[[str, argparse.Namespace], Table]],
          add_flags: Callable[[argparse.ArgumentParser], None] | None = None) -> None:
    """Run `main` as a program."""
    run_main(lambda: main(module, tables, add_flags))
