"""Programs run one after another: each printed as it can be typed, skipped when complete, timed and continued.

A step is complete when the same command has ended well before, and the file it makes is there and not older than the
files it is made from. The history is a file of JSON lines in the output folder.
"""
from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from shared.cli import UserError
from shared.training.files import lock, make_dir

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Step:
    """One command. Paths are relative to `folder`, a folder of the project.

    name: in the history. title: the comment above it. append_to: where its standard output goes, as `>> FILE`.
    output: the file whose presence shows that it is done; None: it is never skipped. output_suffices: it does so
    whatever the history says, for a command that would otherwise start anew.
    """

    name: str
    title: str
    folder: str
    command: list[str]
    output: str | None = None
    inputs: tuple[str, ...] = ()
    append_to: str | None = None
    output_suffices: bool = False

    def text(self) -> str:
        """Return the command as it can be typed."""
        redirect = f" >> {shlex.quote(self.append_to)}" if self.append_to else ""
        return shlex.join(self.command) + redirect


class Runner:
    """Runs steps for the output folder `out`; no second Runner can work there meanwhile.

    history: the JSON-lines file in which the steps that follow are recorded.
    """

    def __init__(self, root: Path, out: Path, dry_run: bool = False) -> None:
        self.root, self.dry_run, self.place, self.history = root, dry_run, root, out / "commands.jsonl"
        self.child: subprocess.Popen | None = None
        self.stopped_by = 0
        self.lock = None if dry_run else lock(out)

    def __enter__(self) -> Runner:
        self.handlers = {number: signal.signal(number, self.pass_on) for number in PASSED_ON}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock is not None:
            self.lock.close()

    def run(self, step: Step) -> None:
        """Print and run a step, unless it is complete or nothing is to be run. Raises SystemExit when it fails."""
        self.announce(step)
        if self.dry_run:
            return
        if self.is_complete(step):
            print(f"# complete: {step.output}", flush=True)
            return
        started = time.time()
        status = self.call(step)
        self.record(step, started, status)
        if status:
            print(f"stopped in \"{step.name}\" (exit status {status}); the same command continues from here",
                  file=sys.stderr, flush=True)
            raise SystemExit(status)

    def announce(self, step: Step) -> None:
        lines = [f"\n# {step.title}"]
        if self.place != self.root / step.folder:
            lines.append("cd " + os.path.relpath(self.root / step.folder, self.place))
            self.place = self.root / step.folder
        print("\n".join([*lines, step.text()]), flush=True)

    def call(self, step: Step) -> int:
        """Run the command and return its exit status; the shell's 128 + number where a signal ended it."""
        output: IO[Any] | None = None
        if step.append_to:
            path = self.root / step.folder / step.append_to
            path.parent.mkdir(parents=True, exist_ok=True)
            output = path.open("a")
        # The lock goes on to the command: if this process is killed alone, nobody else starts beside the command.
        keep = () if self.lock is None else (self.lock.fileno(),)
        try:
            self.child = subprocess.Popen(step.command, cwd=self.root / step.folder, stdout=output, pass_fds=keep)
        except OSError as error:
            raise UserError(f"{step.command[0]} cannot be started ({error.strerror})") from None
        finally:
            if output is not None:
                output.close()
        if self.stopped_by:
            self.child.send_signal(self.stopped_by)
        while True:
            try:
                status = self.child.wait()
                break
            except KeyboardInterrupt:  # the terminal has sent it to the command too: let it save
                self.stopped_by = signal.SIGINT
        self.child = None
        return 128 - status if status < 0 else status or (128 + self.stopped_by if self.stopped_by else 0)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on to the running command, which saves and leaves; this process follows it."""
        self.stopped_by = number
        if self.child is None:
            raise SystemExit(128 + number)
        self.child.send_signal(number)

    def is_complete(self, step: Step) -> bool:
        if step.output is None:
            return False
        folder = self.root / step.folder
        output = folder / step.output
        entries = [entry for entry in read_history(self.history) if entry["name"] == step.name]
        recorded = entries and not entries[-1]["status"] and entries[-1]["command"] == step.text()
        if not output.exists() or not (recorded or step.output_suffices):
            return False
        made = output.stat().st_mtime
        return all((folder / path).exists() and (folder / path).stat().st_mtime <= made for path in step.inputs)

    def record(self, step: Step, started: float, status: int) -> None:
        entry = {"name": step.name, "command": step.text(), "status": status, "started": round(started, 3),
                 "seconds": round(time.time() - started, 3)}
        make_dir(self.history.parent)
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a history file, oldest first; a line cut short by a crash is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def seconds_by_step(path: Path) -> dict[str, float]:
    """Return the seconds that each step has taken, over all its interruptions, until it first was complete.

    A step started anew by another command counts from there.
    """
    seconds: dict[str, float] = {}
    state: dict[str, tuple[str, bool]] = {}
    for entry in read_history(path):
        name, command = entry["name"], entry["command"]
        known, done = state.get(name, ("", False))
        if command != known:
            seconds[name], done = 0.0, False
        if not done:
            seconds[name] += entry["seconds"]
        state[name] = (command, done or entry["status"] == 0)
    return seconds
