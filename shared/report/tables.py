"""A table of a paper as a command: the runs it needs are run or continued, aggregated and compared with print.

    python -m TorchSSL.tables cifar10 --list              # the runs and their state
    python -m TorchSSL.tables cifar10 --only fixmatch     # run what is missing, write table.md, .csv, .json and .png
    python -m TorchSSL.tables cifar10 --scale tiny        # the same machinery on the digits, in minutes

A paper's `tables.py` holds tables as data (Table, Cell, Job, Stage) and calls `serve`. Each run has a folder
`<out>/<table>-<scale>/<job>/seed_<s>` with `run.json`: its commands, configuration, commit, hardware and result (tables
that share runs have them in the folder `<out>/<Table.runs>`). The same command again reuses what is finished and
continues what is not. Several of them may work on one folder at a time: a run is held by a lock that lives as long as
the process that computes it.
"""
from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import IO, Any

from shared.cli import Choice, Flag, Float, Int, Option, UserError, nearest, parse, run_main
from shared.report.table_report import measure, write_table
from shared.training.files import InUse, in_use, lock, write_json
from shared.training.precision import commit, machine
from shared.training.progress import duration

ROOT = Path(__file__).resolve().parents[2]
LOCK = ".table.lock"  # of a run; the programs that it consists of may lock the same folder
Values = Mapping[str, Mapping[str, float]]  # metric -> protocol -> value, in the unit of the table


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    words: what follows `python`, or a shell script and its arguments. {out}, {data} and {seed} in them stand for the
    folder of the run, that of the data sets, and the seed.
    """
    name: str
    words: Sequence[str]


@dataclass(frozen=True)
class Job:
    """The run of one or more cells: its stages run in order, once per seed.

    name        folder of the run
    stages      the commands; each continues what it finds in the folder when it is started again
    read        folder of the finished run -> metric -> protocol -> value
    configs     files whose content belongs to the identity of the run
    first_seed  {seed} in the commands of seed 0
    """
    name: str
    stages: tuple[Stage, ...]
    read: Callable[[Path], Values]
    configs: tuple[Path, ...] = ()
    first_seed: int = 0


@dataclass(frozen=True)
class Printed:
    """A number of the paper: mean, and standard deviation if printed."""
    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Cell:
    row: str
    column: str
    job: Job
    metric: str
    printed: Printed | None = None


@dataclass(frozen=True)
class Table:
    """source: where the printed numbers stand. protocols: the first is that of the paper. seeds: those of the paper.
    base: a row with which the others are compared, seed by seed. runs: the folder of the runs, for tables that share
    them; "": the table's own."""
    name: str
    title: str
    source: str
    unit: str
    cells: tuple[Cell, ...]
    protocols: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    note: str = ""
    base: str = ""
    runs: str = ""

    def view(self, name: str, title: str, scale: str, keep: Callable[[Cell], bool]) -> Table:
        """Return a table of the cells to keep, that shares the runs of this one."""
        return replace(self, name=name, title=title, cells=tuple(filter(keep, self.cells)),
                       runs=self.runs or f"{self.name}-{scale}")

    def jobs(self) -> list[Job]:
        return list({cell.job.name: cell.job for cell in self.cells}.values())

    def first_seeds(self, count: int | None) -> tuple[int, ...]:
        """Return `count` seeds: the paper's, then consecutive numbers; None: the paper's."""
        last = self.seeds[-1]
        return self.seeds if count is None else (*self.seeds, *range(last + 1, last + 1 + count))[:count]


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Task:
    """One job with one seed, in its folder."""
    job: Job
    seed: int
    folder: Path
    data_dir: Path

    @property
    def name(self) -> str:
        return f"{self.job.name}/seed_{self.seed}"

    def words(self, stage: Stage) -> list[str]:
        """Return the words of a stage's command."""
        values = {"{out}": self.folder, "{data}": self.data_dir, "{seed}": self.job.first_seed + self.seed}
        words = list(stage.words)
        for place, value in values.items():
            words = [word.replace(place, str(value)) for word in words]
        return words

    def identity(self) -> dict[str, Any]:
        """Return the identity of a run: the commands, without the paths of this machine, and the files."""
        places = {str(self.folder): "{out}", str(self.data_dir): "{data}", str(ROOT): "{root}"}
        commands = {stage.name: self.words(stage) for stage in self.job.stages}
        for place, name in places.items():
            commands = {key: [word.replace(place, name) for word in words] for key, words in commands.items()}
        return {"commands": commands, "seed": self.seed,
                "configs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.job.configs}}

    def record(self) -> dict[str, Any]:
        """Return run.json, or {} if absent; UserError if the folder holds a run of another identity."""
        path = self.folder / "run.json"
        # Looked at first: another process writes run.json, under a hidden name until it is whole, before anything else.
        holds_files = self.folder.exists() and any(not entry.name.startswith(".") for entry in self.folder.iterdir())
        if not path.exists():
            if holds_files:
                raise UserError(f"{self.folder} holds files but no run.json: it is not a run of this table; move it "
                                "away or give another --out")
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(self.identity()))
        changed = [key for key in wanted if found["identity"].get(key) != wanted[key]]
        if changed:
            raise UserError(f"{self.folder} was made with other {' and '.join(changed)} than the table's, so it does "
                            "not count; move it away or give another --out")
        return found

    def finished(self) -> bool:
        return self.record().get("state") == "finished"

    def state(self) -> str:
        """Return not run, running, interrupted or finished."""
        state = self.record().get("state", "not run")
        return "interrupted" if state == "running" and not in_use(self.folder, LOCK) else state

    def write(self, **values: Any) -> None:
        content = {"identity": self.identity(), **self.record(), **values}
        write_json(self.folder / "run.json", content)


def compute(task: Task, environment: Mapping[str, str], held: IO) -> None:
    """Run or continue one run; the caller holds its lock."""
    found = task.record()
    done: dict[str, float] = found.get("stages", {})
    processor: dict[str, float] = found.get("processor", {})
    facts = {"commit": commit(), "hardware": machine(), "threads": environment.get("OMP_NUM_THREADS")}
    earlier = [*found.get("earlier", []), {name: found[name] for name in facts}] if found else []
    task.write(state="running", stages=done, earlier=earlier, **facts)
    for path in task.job.configs:  # beside the log, for the reader
        shutil.copyfile(path, task.folder / path.name)
    for stage in task.job.stages:
        if stage.name not in done:
            took = call(task.words(stage), task.folder / f"{stage.name}.log", environment, held)
            done[stage.name], processor[stage.name] = (round(seconds, 2) for seconds in took)
            task.write(stages=done, processor=processor)
    try:
        result = task.job.read(task.folder)
    except (OSError, ValueError, LookupError, StopIteration) as error:
        raise UserError(f"its result cannot be read, {type(error).__name__}: {error} (in {task.folder})") from error
    task.write(state="finished", result=result)


def call(words: Sequence[str], log: Path, environment: Mapping[str, str], held: IO) -> tuple[float, float]:
    """Run a command, its output in `log`; return its seconds and those of processors on this machine.

    Raises UserError with the last line of the log if it fails.
    """
    program = "bash" if words[0].endswith(".sh") else sys.executable
    # Scripts that start scripts call them by the name `python`: the same one as ours.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with open(log, "ab") as output:
        output.write(f"$ {Path(program).name} {shlex.join(words)}\n".encode())
        output.flush()
        start = time.monotonic()
        process = subprocess.Popen([program, *words], stdout=output, stderr=subprocess.STDOUT, pass_fds=[held.fileno()],
                                   stdin=subprocess.DEVNULL, env={**os.environ, "PATH": search, **environment})
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise UserError(f"{words[0]} ended with status {process.returncode}: {last[:300]} (see {log})")
    return time.monotonic() - start, used.ru_utime + used.ru_stime


# ---------------------------------------------------------------- all of them


def run_tasks(tasks: Sequence[Task], slots: Sequence[Mapping[str, str]]) -> list[str]:
    """Run the tasks, as many at a time as there are slots (environment variables of each); return what failed."""
    waiting: SimpleQueue[Task] = SimpleQueue()
    for task in tasks:
        waiting.put(task)
    failed: list[str] = []

    def work(environment: Mapping[str, str]) -> None:
        while True:
            try:
                task = waiting.get_nowait()
                with lock(task.folder, name=LOCK) as held:
                    if not task.finished():
                        print(f"{task.name}: started", flush=True)
                        compute(task, environment, held)
                        print(f"{task.name}: done in {duration(sum(task.record()['stages'].values()))}", flush=True)
            except Empty:
                return
            except InUse:  # another process computes it: look again when the others are done
                time.sleep(1)
                waiting.put(task)
            except (UserError, OSError) as error:
                failed.append(f"{task.name}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            list(pool.map(work, slots))
        except KeyboardInterrupt:  # the commands under way get it too, and no other begins
            while not waiting.empty():
                waiting.get()
            raise
    return failed


class SlurmJob:
    """A command as a SLURM job; where the time limit ends it, submitit puts it back into the queue, to go on."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __call__(self) -> None:
        subprocess.run(self.words, check=True)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission  # an optional dependency

        return DelayedSubmission(self)


def submit(tasks: Sequence[Task], words: Sequence[str], options: SimpleNamespace) -> list[str]:
    """Run every task as a SLURM job that calls this program for it; return what failed."""
    try:
        import submitit
        executor = submitit.SlurmExecutor(options.out / "slurm", max_num_timeout=options.slurm_restarts)
    except ImportError:
        raise UserError("--slurm needs submitit: pip install 'fewlabel[slurm]'") from None
    except RuntimeError as error:
        raise UserError(f"--slurm: {error}") from None
    more = dict(pair.partition("=")[::2] for pair in options.slurm_args.split())
    executor.update_parameters(job_name="fewlabel", partition=options.slurm, time=int(60 * options.slurm_hours),
                               gpus_per_node=options.slurm_gpus or None, additional_parameters=more)
    jobs = {task.name: executor.submit(SlurmJob(sys.executable, *words, f"--run={task.name}")) for task in tasks}
    failed = []
    for name, job in jobs.items():
        print(f"{name}: job {job.job_id}", flush=True)
    for name, job in jobs.items():
        error = job.exception()
        print(f"{name}: {'failed' if error else 'done'}", flush=True)
        failed += [f"{name}: {str(error).strip().splitlines()[-1]}"] * bool(error)
    return failed


# ---------------------------------------------------------------- command line

FLAGS = (
    Option("table", help="name of the table; without it the names are listed"),
    Option("--scale", Choice("paper", "tiny"), "paper", "tiny: short runs on the digits, to try the commands"),
    Option("--out", metavar="DIR", help="folder of the runs", default_help="./tables/<paper>"),
    Option("--data-dir", default="data", metavar="DIR", help="folder of the data sets"),
    Option("--seeds", Int(1), None, "number of seeds", default_help="the paper's"),
    Option("--only", default="", metavar="TEXT,...", help="rows and columns whose name contains one of these words"),
    Option("--list", Flag, False, "only list the runs"),
    Option("--aggregate", Flag, False, "run nothing; write the table of the finished runs"),
    Option("--jobs", Int(1), 1, "runs at a time, without --gpus"),
    Option("--gpus", default="", metavar="0,1,...", help="GPUs by number; each has one run at a time"),
    Option("--slurm", metavar="PARTITION", help="every run as a SLURM job (submitit)"),
    Option("--slurm-hours", Float(0, 1e6, open="low"), 48.0, "time limit of a SLURM job", unit="hours"),
    Option("--slurm-gpus", Int(0), 1, "GPUs of a SLURM job"),
    Option("--slurm-args", default="", metavar='"KEY=VALUE ..."',
           help='further options of sbatch, for instance "account=us cpus-per-task=8"'),
    Option("--slurm-restarts", Int(0), 20, "restarts of a job that its time limit has ended"),
    Option("--run", metavar="JOB/seed_S", help="only this run, as a SLURM job does"),
)
Tables = Mapping[str, Callable[[str, SimpleNamespace], Table]]


def main(module: str, tables: Tables, flags: Sequence[Option] = (), argv: Sequence[str] | None = None) -> None:
    """Serve `python -m <module> TABLE ...`; `tables`: name -> function of (scale, options) that returns the table."""
    doc = f"Run, aggregate and compare a table of the paper. Tables: {', '.join(tables)}"
    options = parse(doc, (*FLAGS, *flags), argv)
    options.out = Path(options.out or Path("tables", module.partition(".")[0])).resolve()
    options.data_dir = Path(options.data_dir).resolve()
    if options.table is None:
        for name, make in tables.items():
            print(f"{name:24s} {make(options.scale, options).title}")
        return
    if options.table not in tables:
        raise UserError(f"no table {options.table}{nearest(options.table, tables)}; there are: {', '.join(tables)}")
    whole = tables[options.table](options.scale, options)
    if options.scale == "tiny":  # nobody printed that
        whole = replace(whole, cells=tuple(replace(cell, printed=None) for cell in whole.cells))
    chosen = selected(whole, options.only)
    own = f"{whole.name}-{options.scale}"
    runs = options.out / (whole.runs or own)
    folder = runs if whole.runs == whole.name else options.out / own
    seeds = whole.first_seeds(options.seeds)

    def task(job: Job, seed: int) -> Task:
        return Task(job, seed, runs / job.name / f"seed_{seed}", options.data_dir)

    tasks = [task(job, seed) for job in chosen.jobs() for seed in seeds]
    if options.run is not None:
        tasks = [one for one in tasks if one.name == options.run]
        if not tasks:
            raise UserError(f"--run {options.run}: the table {whole.name} has no such run")
    if options.list:
        for one in tasks:
            print(f"{one.name}: {one.state()}")
        return
    missing = [one for one in tasks if not one.finished()]
    failed: list[str] = []
    if options.slurm is not None and options.run is None and not options.aggregate:
        failed = submit(missing, ["-m", module, *(sys.argv[1:] if argv is None else argv)], options)
    elif not options.aggregate:
        if options.run is not None and hasattr(signal, "SIGUSR2"):
            # A SLURM job gets it before its time is up; its first process asks for more, and SIGTERM ends the others.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, machine()["cores"] // options.jobs)))
        cards = [{"CUDA_VISIBLE_DEVICES": card} for card in options.gpus.split(",") if card]
        failed = run_tasks(missing, cards or [{"OMP_NUM_THREADS": threads}] * options.jobs)
    if options.run is None:
        with lock(folder, wait=True):  # two of these commands that end at a time write one after the other
            content = {"title": whole.title, "name": whole.name, "command": f"python -m {module} {whole.name}",
                       "source": whole.source, "unit": whole.unit, "scale": options.scale,
                       "protocols": list(whole.protocols), "seeds": list(seeds), "note": whole.note,
                       "base": whole.base, "machine": machine(), "cells": []}
            for cell in whole.cells:
                of_cell = [task(cell.job, seed) for seed in seeds]
                found = [(one.seed, one.folder, one.record()) for one in of_cell if one.finished()]
                content["cells"].append(measure(cell, whole.protocols, folder, found))
            print(write_table(content, folder))
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} runs failed; the same command tries again. {failed[0]}")


def selected(table: Table, only: str) -> Table:
    """Return the table with the rows and columns whose name contains one of the words, and the row to compare with."""
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    names = [f"{cell.row} {cell.column}".lower() for cell in table.cells]
    for word in words:
        if not any(word in name for name in names):
            raise UserError(f"--only {word}: the table {table.name} has no such row or column; rows: "
                            f"{', '.join(dict.fromkeys(cell.row for cell in table.cells))}")
    return replace(table, cells=tuple(
        cell for cell, name in zip(table.cells, names, strict=True)
        if not words or cell.row == table.base or any(word in name for word in words)))


def serve(module: str, tables: Tables, flags: Sequence[Option] = ()) -> None:
    """Run `main` as a program."""
    run_main(lambda: main(module, tables, flags))
