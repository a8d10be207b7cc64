"""Starting the project's programs in tests, the way a user does."""
from __future__ import annotations

import io
import os
import pickletools
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared import cli
from shared.cli import Option
from tests.shared.clean import script_process

ROOT = Path(__file__).resolve().parents[2]
# What a file of tensors and plain values is made of.
PLAIN_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", *(f"torch {kind}Storage" for kind in (
    "Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte", "Bool"))}


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a program under test: the project importable, no accelerator."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **extra}


def start(script: str | Path, *args: str | Path, cwd: Path | None = None, ranks: int = 1, restarts: int = 0,
          before: Sequence[str | Path] = (), **extra: str) -> subprocess.Popen:
    """Start a script of the project; with `ranks` > 1 under torchrun on this machine, which starts all of them again
    `restarts` times. before: a command that starts what follows it."""
    launcher = [*map(str, before), sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                     f"--max-restarts={restarts}"]
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, args)], cwd=cwd or ROOT, text=True,
                            env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen | None = None) -> None:
    """Wait for what another process does, however long it takes; fail if `process` ends without having done it."""
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            pytest.fail(f"the process ended with status {process.returncode} before")
        time.sleep(0.02)


def run(script: str | Path, *args: str | Path, status: int = 0, timeout: float = 300, fresh: bool = False,
        **how: Any) -> subprocess.CompletedProcess:
    """Run a script to its end and check its exit status. how: see `start`.

    An interpreter is started where `fresh` says so or `restarts` or `before` needs it, with torchrun for several ranks;
    otherwise each rank is a fork of a process that has imported torch. Like torchrun this ends all ranks when one
    fails, and the status is then 1.
    """
    if fresh or "restarts" in how or "before" in how:
        process = start(script, *args, **how)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        returned = process.returncode
    else:
        returned, out, err = _run_forked(ROOT / script, [*map(str, args)], timeout, **how)
    assert returned == status, f"exit status {returned}\n{out[-3000:]}\n{err[-3000:]}"
    return subprocess.CompletedProcess([script, *args], returned, out, err)


def _run_forked(script: Path, args: list[str], timeout: float, cwd: Path | None = None, ranks: int = 1,
                **extra: str) -> tuple[int, str, str]:
    """Return the exit status, what was written to stdout and what to stderr."""
    worlds: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
                  "LOCAL_WORLD_SIZE": str(ranks)}
        worlds = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        processes = [script_process(script, args, cwd or ROOT, environment(**extra, **world), out, err)
                     for world in worlds]
        until = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            while any(process.exitcode is None for process in processes) and not any(
                    process.exitcode for process in processes) and time.monotonic() < until:
                wait([process.sentinel for process in processes if process.exitcode is None], until - time.monotonic())
        finally:
            in_time = time.monotonic() < until
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        said, complained = out.read_text(), err.read_text()
    assert in_time, f"not ended in {timeout} s\n{said[-3000:]}\n{complained[-3000:]}"
    returned = [process.exitcode for process in processes]
    return returned[0] if ranks == 1 else int(any(returned)), said, complained


def one_line_error(result: subprocess.CompletedProcess) -> str:
    """Return the error line, having checked that it is the only thing said on stderr besides warnings."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def help_flags(parse: Callable[[list[str]], Any]) -> set[str]:
    """Return the flags that the help of a command line names."""
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit):
        parse(["--help"])
    return set(re.findall(r"--[A-Za-z][\w-]*", out.getvalue()))


class Declared(BaseException):
    """A script has declared its options, {title: options}."""


@cache
def declared_options(script: str, command: str = "") -> tuple[Option, ...]:
    """Return the options that a script of the project gives to `shared.cli.parse`. command: words before its flags."""
    def declared(_: str, groups: dict[str, Sequence[Option]]) -> None:
        raise Declared(groups)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of runpy, that the module has been imported before
        patch.setattr(cli, "_build_parser", declared)
        patch.setattr(sys, "argv", [script, *command.split()])
        with pytest.raises(Declared) as ended:
            runpy.run_module(script.removesuffix(".py").replace("/", "."), run_name="__main__")
    return tuple(option for group in ended.value.args[0].values() for option in group)


def pickled_names(file: Path) -> set[str]:
    """Return the names, as "module name", that the pickle in a file of torch.save, or the pickle `file`, asks for."""
    data = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    found, texts = set(), []
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "GLOBAL":
            found.add(argument)
        elif operation.name == "STACK_GLOBAL":
            found.add(" ".join(texts[-2:]))
        elif isinstance(argument, str):
            texts.append(argument)
    return found


def doubled(levels: int) -> list:
    """Return a list that holds twice the list below it, and so on: a few bytes in a pickle, 2^levels lists unfolded."""
    value: list = []
    for _ in range(levels):
        value = [value, value]
    return value


def growth(file: Path) -> float:
    """Return how fast the memory of a run grew behind its first tenth, in MB per 1,000 steps: `file` has lines of steps
    and MB, as mishap.py writes them."""
    steps, resident = np.loadtxt(file, unpack=True)
    late = steps > steps[-1] / 10
    return 1000 * np.polyfit(steps[late], resident[late], 1)[0]


def assert_same(a, b, path: str = "") -> None:
    """Check two nested structures of tensors and plain values for bitwise equality."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{path} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{path}: {a.keys()} and {b.keys()}"
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{number}")
    else:
        assert a == b or (a != a and b != b), f"{path}: {a} and {b}"  # nan is the same as nan
