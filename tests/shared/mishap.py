"""Runs a program of the project, to which something happens behind a step of its run:

    python tests/shared/mishap.py WHAT STEP SCRIPT ARGUMENTS...

kill       rank 1 is killed, once (a file `died` in the run's folder remembers it)
drift      a weight of rank 1 moves, as no other rank's does
nan        a weight is no longer a number
full       another program fills the disk that holds the run's folder
read-only  the run's folder may no longer be written to
memory     nothing; every STEP steps the resident memory in MB goes to the file `memory` in the working folder
"""
from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

import torch

from shared.distributed import unwrap
from shared.training.run import Run


def first_weight(run: Run) -> torch.Tensor:
    """Return the first parameter of the first network that the run keeps."""
    kept = (unwrap(getattr(part, "module", part)) for part in run.keep.values())
    return next(next(net.parameters()) for net in kept if isinstance(net, torch.nn.Module))


def fill(folder: Path) -> None:
    """Leave room for nothing but the end of a page."""
    with open(folder / "others", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


@torch.no_grad()
def happen(what: str, run: Run) -> None:
    second = run.world.rank == 1
    if what == "kill" and second and not (run.outdir / "died").exists():
        (run.outdir / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "drift" and second:
        first_weight(run).view(-1)[0].add_(1e-3)
    elif what == "nan":
        first_weight(run).view(-1)[0].fill_(float("nan"))
    elif what == "full":
        fill(run.outdir)
    elif what == "read-only":
        run.outdir.chmod(0o555)


def main() -> None:
    what, at, script, *arguments = sys.argv[1:]
    after = Run._after_step

    def hurt(run: Run, total: int) -> None:
        if what == "memory" and run.step % int(at) == 0:
            with open("memory", "a") as file:
                file.write(f"{run.step} {resident()}\n")
        elif run.step == int(at):
            happen(what, run)
        after(run, total)

    Run._after_step = hurt
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
