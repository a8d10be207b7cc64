"""Run programs on the null GPU and say what a training step of each costs.

    python -m tests.gpu.measure [NAME...]                 # print the costs; with --write also into budgets.json
    python -m tests.gpu.measure --published [NAME...]     # the same of the published commands at their published size

The programs are those of tests/gpu/programs.py and tests/gpu/published.py.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.gpu.build import wanted
from tests.gpu.programs import PROGRAMS, Program
from tests.gpu.published import PUBLISHED
from tests.shared.programs import ROOT

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.json"
WARM_UP = 11  # the first steps fill caches, and in ten of them DistributedDataParallel's own timers wait
COUNTED = 3
STEPS = WARM_UP + COUNTED
NO_VALUES = ("shared.training.run:Run._check_finite", "MetaSemi.core.training:evaluate=[0, 0, 0]")


@dataclass(frozen=True)
class Cost:
    """What a program's step costs: launches of kernels and library calls (median), waits of the host (most of any
    step without a line of the log), the lines that wait, and the peak of the allocator in bytes (weights included; most
    of any step). Threads of the backward pass free some tensors late, so the peak of MetaSemi at two ranks varies from
    step to step by a copy of the gradients: its budgets are the highest of many runs.

    error: what ended the program before its time, or None. mistakes: in its collectives.
    """

    launches: int
    waits: int
    where: tuple[str, ...]
    peak: int
    error: str | None
    mistakes: tuple[str, ...] = ()


def unavailable() -> str | None:
    """Return why there can be no null GPU here, or None."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"there is no {tool} to build the null GPU with"
    try:
        wanted()
    except SystemExit:
        return "this PyTorch is not built for CUDA"
    return None


def measure(programs: Mapping[str, Program], ranks: int, folder: Path) -> dict[str, Cost]:
    """Run programs in one process as rank 0 of `ranks`, each in a folder of its own below `folder`."""
    calls = []
    for name, program in programs.items():
        own = folder / f"{name} {ranks}"
        own.mkdir(parents=True)
        calls.append({"name": name, "folder": str(own), "script": str(ROOT / program.script),
                      "args": program.args(own, STEPS)})
    listed, result = folder / f"programs {ranks}.json", folder / f"result {ranks}.json"
    listed.write_text(json.dumps(calls))
    skipped = [part for name in NO_VALUES for part in ("--skip", name)]
    command = [sys.executable, HERE / "nullgpu.py", "--programs", "--ranks", str(ranks), "--warmup", str(WARM_UP),
               "--root", ROOT, *skipped, "--json", result, listed]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, timeout=3000,
                          env={**os.environ, "FEWLABEL_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT),
                               "CUBLAS_WORKSPACE_CONFIG": ":0:0"})  # or the first program would hold it for all
    if not result.exists():
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    costs = {name: _cost(found) for name, found in json.loads(result.read_text()).items()}
    if any(cost.error for cost in costs.values()):
        print((done.stdout + done.stderr)[-3000:], file=sys.stderr)
    return costs


def _cost(found: Mapping[str, Any]) -> Cost:
    steps = found["each_step"][WARM_UP:-1]  # an evaluation follows the last one
    error = found["error"]
    if error is None and (found["status"] or len(steps) < COUNTED - 1):
        error = f"status {found['status']} after {found['steps']} steps"
    if not steps:
        return Cost(0, 0, (), 0, error)
    return Cost(sorted(step["launches"] for step in steps)[len(steps) // 2], max(step["waits"] for step in steps),
                tuple(row["where"] for row in found["waits"] + found["pageable_copies"]),
                max(step["peak"] for step in steps), error,
                tuple(f"{row['name']}: {row['mistake']} {row['where']}" for row in found.get("mistakes", ())))


def report(name: str, ranks: int, cost: Cost) -> None:
    print(f"{name:28} {ranks} rank(s): {cost.launches:6} launches {cost.waits:4} waits "
          f"{cost.peak / 2**20:8.1f} MiB  {cost.error or ''} {cost.mistakes or ''}", flush=True)
    for where in cost.where if cost.waits else ():
        print(f"{'':10} {where}")


def published(names: list[str]) -> None:
    """Report what the published commands cost on each of their GPUs."""
    with TemporaryDirectory() as folder:
        for name in names or PUBLISHED:
            program, ranks = PUBLISHED[name]
            report(name, ranks, measure({name: program}, ranks, Path(folder))[name])


def main() -> None:
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    if "--published" in sys.argv:
        return published(names)
    names = names or list(PROGRAMS)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for ranks in (1, 2):
        with TemporaryDirectory() as folder:
            for name, cost in measure({name: PROGRAMS[name] for name in names}, ranks, Path(folder)).items():
                report(name, ranks, cost)
                found.setdefault(name, {})[str(ranks)] = {"launches": cost.launches, "peak": cost.peak}
    if "--write" in sys.argv:
        budgets = json.loads(BUDGETS.read_text()) | found
        BUDGETS.write_text(json.dumps(dict(sorted(budgets.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
