"""Runs a training script of EDM that gets a signal at a given moment:

    python tests/edm/interrupted.py SIGNAL MOMENT SCRIPT ARGUMENTS...

MOMENT: `options`, when these are written; a number, in that step of the run; `state`, before the last training state.
"""
from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

from EDM.training import launch, training_loop
from shared.training.run import Run

number, moment = signal.Signals[sys.argv[1]], sys.argv[2]


def before_or_after(function: Callable, happens: Callable[..., bool], after: bool) -> Callable:
    """Return the function with the signal before or after its call."""
    def wrapped(*arguments: Any) -> Any:
        if after:
            function(*arguments)
        if happens(*arguments):
            os.kill(os.getpid(), number)
        return None if after else function(*arguments)

    return wrapped


if moment == "options":
    launch.write_options = before_or_after(launch.write_options, lambda *_: True, after=True)
elif moment == "state":
    training_loop.save_state = before_or_after(training_loop.save_state, lambda path, *_: "000001" in path.name,
                                               after=False)
else:
    # A step that is killed has been saved; one that is to end saves itself.
    Run._after_step = before_or_after(Run._after_step, lambda run, total: run.step == int(moment),
                                      after=number == signal.SIGKILL)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
