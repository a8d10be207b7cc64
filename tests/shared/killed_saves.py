"""Runs tiny_run.py again and again in one folder, killed at a random moment of a save each time:

    python tests/shared/killed_saves.py FOLDER KILLS SEED

Half of the times the moment is a write, in the middle of its bytes, else a flush to the disk or a renaming. Behind
every death the folder has to hold a checkpoint that is whole, no older than the last one that was completed. Then the
run is finished; the number of its steps is printed.
"""
from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401 - here rather than in each child

from shared.training import checkpoint, files, run
from shared.training.checkpoint import load_newest
from tests.shared import tiny_run

EVERY, WITHOUT_END, NEVER = 3, 1 << 20, float("inf")


class Torn:
    """A file of which a write may be cut short by the end of the process."""

    def __init__(self, file, moment) -> None:
        self.file, self.moment = file, moment

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        self.file.write(data[:half])
        if self.moment.comes():
            self.file.flush()
            die()
        self.file.write(data[half:])
        return len(data)


class Moment:
    """The `at`-th thing of its kind that happens to a file."""

    def __init__(self, at: float) -> None:
        self.at, self.seen = at, 0

    def comes(self) -> bool:
        self.seen += 1
        return self.seen == self.at

    def before(self, function):
        def guarded(*arguments):
            if self.comes():
                die()
            return function(*arguments)
        return guarded


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, steps: int, completed: int, write: float = NEVER, flush: float = NEVER) -> int:
    """Train in a process of its own, which dies at the `write`-th write or the `flush`-th flush or renaming. Its last
    whole save is in the file `completed`. Return the exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    torn, cut, save = Moment(write), Moment(flush), checkpoint.write_checkpoint
    files.open = lambda path, *mode, **more: Torn(open(path, *mode, **more), torn)
    files.os.fsync, files.os.replace = cut.before(os.fsync), cut.before(os.replace)

    def told(path: Path, content: dict, **how: bool) -> None:
        save(path, content, **how)
        os.pwrite(completed, f"{content['step']:012d}".encode(), 0)

    run.write_checkpoint = told
    sys.argv = ["tiny_run.py", str(folder), "--steps", str(steps), "--save-every", str(EVERY)]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    tiny_run.main()
    os._exit(0)


def main() -> None:
    folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    folder.mkdir()
    completed, step = os.open(folder / "completed", os.O_RDWR | os.O_CREAT), 0
    for kill in range(kills):
        # A save makes some 200 writes, then 2 flushes and 2 renamings.
        moment = dict(write=chance.randint(1, 400)) if kill % 2 else dict(flush=chance.randint(1, 8))
        status = train(folder, WITHOUT_END, completed, **moment)
        assert status == -signal.SIGKILL, status
        # A save can be whole though its process died before saying so.
        newest, whole = load_newest(folder / "checkpoint.pt"), max(step, int(os.pread(completed, 12, 0) or 0))
        step = newest[1]["step"] if newest else 0
        assert whole <= step <= whole + EVERY, f"step {step} found, {whole} completed"
    steps = step + 2 * EVERY
    assert train(folder, steps, completed) == 0
    assert not list(folder.glob(".*.tmp")), "files of killed saves are left"
    print(steps)


if __name__ == "__main__":
    main()
