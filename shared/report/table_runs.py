"""What a table is made of, and its runs: commands in a folder that is locked, continued, recorded, and refused where it
holds another run."""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from shared.cli import UserError
from shared.training.files import InUse, atomic, in_use, lock
from shared.training.hardware import commit, machine
from shared.training.progress import duration

ROOT = Path(__file__).resolve().parents[2]
LOCK = ".table.lock"  # of a run; the programs that it consists of may lock the same folder
Values = Mapping[str, Mapping[str, float]]  # metric -> protocol -> value, in the unit of the table


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    name        of the stage, in the log and the estimate
    command     (folder of the run, seed, iterations or None for the whole length) -> words after `python`; none where
                a trial of a few iterations cannot be made, and the estimate leaves the stage out
    iterations  how many there are at full length, in the unit that `command` takes; None: it has no such length
    """
    name: str
    command: Callable[[Path, int, int | None], Sequence[str]]
    iterations: int | None = None


@dataclass(frozen=True)
class Job:
    """What fills one or more cells: its stages run in order, once per seed.

    name     folder of the run
    stages   the commands; each continues what it finds in the folder when it is started again
    read     folder of the finished run -> metric -> protocol -> value
    configs  files whose content belongs to the identity of the run
    """
    name: str
    stages: tuple[Stage, ...]
    read: Callable[[Path], Values]
    configs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Printed:
    """A number of the paper: mean, and standard deviation where it is printed."""
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
        """Return so many seeds: the paper's, then the numbers after the last of them; None: the paper's."""
        last = self.seeds[-1]
        return self.seeds if count is None else (*self.seeds, *range(last + 1, last + 1 + count))[:count]


# ------------------------------------------------------------------------------------------------------------ one run


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

    def identity(self) -> dict[str, Any]:
        """Return what makes two runs the same: the commands, without the folder, and the configuration files."""
        commands = {stage.name: [self.anywhere(word) for word in stage.command(self.folder, self.seed, None)]
                    for stage in self.job.stages}
        return {"commands": commands, "seed": self.seed,
                "configs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.job.configs}}

    def anywhere(self, word: str) -> str:
        """Return a word of a command without the places of this machine, which do not change what is computed."""
        for path, name in ((self.folder, "{out}"), (self.data_dir, "{data}"), (ROOT, "{root}")):
            word = word.replace(str(path), name)
        return word

    def record(self) -> dict[str, Any]:
        """Return run.json, {} where there is none; raise UserError where the folder holds a run of another identity."""
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
        with atomic(self.folder / "run.json", "w") as file:
            json.dump(content, file, indent=1)


def call(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: str,
         held: IO | None) -> tuple[float, float]:
    """Run `python <command>`, its output in <folder>/<log>; return its seconds and those of processors on this machine.

    UserError with its last line where it fails.
    """
    path = folder / log
    # Scripts that start scripts call them by the name `python`: the same one as ours.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with open(path, "ab") as output:
        output.write(f"$ python {shlex.join(command)}\n".encode())
        output.flush()
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, env={**os.environ, "PATH": search, **environment},
                                   pass_fds=() if held is None else (held.fileno(),))
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(f"{command[0]} ended with status {process.returncode}: {lines[-1][:300]} (see {path})")
    return time.monotonic() - start, used.ru_utime + used.ru_stime


def compute(task: Task, environment: Mapping[str, str], held: IO) -> None:
    """Run or continue one run; the caller holds its lock."""
    found = task.record()
    done: dict[str, float] = found.get("stages", {})
    processor: dict[str, float] = found.get("processor", {})
    facts = {"commit": commit(), "hardware": machine(), "threads": environment.get("OMP_NUM_THREADS")}
    earlier = [*found.get("earlier", []), {name: found[name] for name in facts}] if found else []
    task.write(state="running", stages=done, earlier=earlier, **facts)
    for path in task.job.configs:  # beside the log, for whoever looks at the run
        shutil.copyfile(path, task.folder / path.name)
    for stage in task.job.stages:
        if stage.name in done:
            continue
        took = call(stage.command(task.folder, task.seed, None), task.folder, environment, f"{stage.name}.log", held)
        done[stage.name], processor[stage.name] = (round(seconds, 2) for seconds in took)
        task.write(stages=done, processor=processor)
    try:
        result = task.job.read(task.folder)
    except (OSError, ValueError, LookupError, StopIteration) as error:
        raise UserError(f"its result cannot be read, {type(error).__name__}: {error} (in {task.folder})") from error
    task.write(state="finished", result=result)


# --------------------------------------------------------------------------------------------------------- all of them


def run_tasks(tasks: Sequence[Task], slots: Sequence[Mapping[str, str]]) -> list[str]:
    """Run the tasks, as many at a time as there are slots (environment variables of each); return what failed."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    failed: list[str] = []

    def work(environment: Mapping[str, str]) -> None:
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                with lock(task.folder, name=LOCK) as held:
                    if not task.finished():
                        print(f"{task.name}: started", flush=True)
                        compute(task, environment, held)
                        print(f"{task.name}: done in {duration(sum(task.record()['stages'].values()))}", flush=True)
            except InUse:  # another process computes it: look again when the others are done
                time.sleep(1)
                waiting.put(task)
            except (UserError, OSError) as error:
                failed.append(f"{task.name}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(slot,), daemon=True) for slot in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # a plain join would not let Ctrl-C through
            thread.join(0.5)
    return failed


class SlurmJob:
    """A command as a SLURM job; where the time limit ends it, submitit puts it back into the queue, to go on."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    def __call__(self) -> None:
        subprocess.run(self.command, check=True)

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(tasks: Sequence[Task], words: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Run every task as a SLURM job through submitit; return what failed."""
    try:
        import submitit
        executor = submitit.SlurmExecutor(options.out / "slurm", max_num_timeout=options.slurm_restarts)
    except ImportError:
        raise UserError("--slurm needs submitit: pip install 'fewlabel[slurm]'") from None
    except RuntimeError as error:
        raise UserError(f"--slurm: {error}") from None
    executor.update_parameters(job_name="fewlabel", partition=options.slurm, time=int(60 * options.slurm_hours),
                               gpus_per_node=options.slurm_gpus or None, additional_parameters=dict(
                                   pair.partition("=")[::2] for pair in options.slurm_args.split()))
    jobs = {}
    for task in tasks:
        jobs[task] = executor.submit(SlurmJob([sys.executable, *words, "--no-estimate", f"--run={task.name}"]))
        print(f"{task.name}: job {jobs[task].job_id}", flush=True)
    failed = []
    for task, job in jobs.items():
        error = job.exception()
        print(f"{task.name}: {'failed' if error else 'done'}", flush=True)
        if error:
            failed.append(f"{task.name}: {str(error).strip().splitlines()[-1]}")
    return failed


def estimate(jobs: Sequence[Job], cache: Path, data_dir: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """Return the seconds that one run of each job takes on this machine with these variables of the environment, such
    as the GPU that it has; kept in the file `cache`."""
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    seconds = {}
    for number, job in enumerate(jobs, 1):
        identity = Task(job, 0, Path("{out}"), data_dir).identity()
        key = hashlib.sha256(json.dumps([machine(), dict(environment), identity]).encode()).hexdigest()
        if key not in known:
            print(f"{job.name}: timing a few steps ({number} of {len(jobs)})", flush=True)
            try:
                known[key] = extrapolate(job, environment)
            except UserError as error:
                print(f"{job.name}: no estimate: {error}", file=sys.stderr, flush=True)
                continue
            with atomic(cache, "w") as file:
                json.dump(known, file, indent=1)
        seconds[job.name] = known[key]
    return seconds


def extrapolate(job: Job, environment: Mapping[str, str]) -> float:
    """Return the seconds of one run of full length, from trials of 2 and of more iterations of each stage.

    The longer trial of a stage is lengthened until it stands out of the time that a process takes to start. A stage
    without a length counts as it is in the trial.
    """
    few, longest = 2, 512
    lengths = {stage.name: stage.iterations for stage in job.stages if stage.iterations}
    many = dict.fromkeys(lengths, 8)
    short = trial(job, dict.fromkeys(lengths, few), environment)
    while True:
        long = trial(job, many, environment)
        slower = {name: long[name] - short[name] for name in lengths}
        hidden = [name for name in lengths if many[name] < longest and slower[name] <= max(1.0, 0.3 * short[name])]
        if not hidden:
            break
        many.update({name: 4 * many[name] for name in hidden})
    return sum(short.values()) + sum(max(0, lengths[name] - few) * max(0.0, slower[name]) / (many[name] - few)
                                     for name in lengths)


def untried(job: Job) -> list[str]:
    """Return the stages of which no trial can be made."""
    return [stage.name for stage in job.stages if not stage.command(Path("{out}"), 0, 2)]


def trial(job: Job, iterations: Mapping[str, int], environment: Mapping[str, str]) -> dict[str, float]:
    """Return the seconds of each stage with so few iterations, in a folder that is thrown away."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in job.stages:
            command = stage.command(Path(folder), 0, iterations.get(stage.name, 1))
            took = call(command, Path(folder), environment, f"{stage.name}.log", None) if command else (0.0, 0.0)
            seconds[stage.name] = took[0]
    return seconds
