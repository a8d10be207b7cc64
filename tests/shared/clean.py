"""Processes for tests in which torch is imported and nothing has been computed yet: they start in a few milliseconds.

Forked from a server and not from the tests, where earlier ones may have started threads of autograd, which do not
survive a fork. What is imported here is imported once, by the server.
"""
from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch


def clean_process(target: Callable, *args: Any) -> multiprocessing.Process:
    """Return a process ready to start. The arguments travel as pickles."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context.Process(target=_to_the_end, args=(target, *args))


def _to_the_end(target: Callable, *args: Any) -> None:
    try:
        target(*args)
    finally:  # as an interpreter ends; multiprocessing leaves it out, and TensorBoard's writer complains of its queue
        atexit._run_exitfuncs()


def script_process(script: Path, args: list[str], cwd: Path, environment: dict[str, str], out: Path,
                   err: Path) -> multiprocessing.Process:
    """Return a process that does what `python script args` does. out, err: the files that its output goes to."""
    return clean_process(_be_script, script, args, cwd, environment, out, err)


def _be_script(script: Path, args: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    multiprocessing.set_start_method(None, force=True)  # forkserver is the test's choice, not the script's
    sys.argv = [str(script), *args]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
