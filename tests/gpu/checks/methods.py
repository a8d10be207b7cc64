"""Every method's step on the GPU: its numbers, its waits, running out of memory, being stopped and continued."""
from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shared.training.run import Run
from tests.gpu.checks.running import Around, SameDraws, run
from tests.gpu.checks.worker import Place
from tests.gpu.programs import PROGRAMS, ROOT

FP32 = {"TorchSSL": ["--precision=fp32"], "EDM": ["--precision=fp32"], "DDAE": ["--precision=fp32"],
        "DASO": ["PRECISION", "fp32"], "MetaSemi": ["--precision=fp32"]}
STRICT = {"TorchSSL": ["--strict"], "EDM": ["--strict"], "DDAE": ["--strict"]}
# On the null GPU, one program a family: its numbers mean nothing, and all of them run in test_waits.py.
EAGER = tuple(name for name, program in PROGRAMS.items() if not program.compiled)
FAMILIES = ("freematch", "edm", "ddae", "daso", "metasemi")
LOSS_APART, UPDATE_APART = 1e-3, 0.05  # shares of the loss and of the update; Adam turns rounding noise into steps


def names_of(place: Place) -> tuple[str, ...]:
    return FAMILIES if place.null else EAGER


def flags_of(name: str, table: dict[str, list[str]]) -> list[str]:
    return table.get(PROGRAMS[name].script.split("/")[0], [])


def steps(place: Place) -> dict[str, Any]:
    """One fp32 step of every method from the same weights, batch and draws: GPU = CPU."""
    names = names_of(place)
    other = None
    if not place.null:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
        other = subprocess.Popen([sys.executable, "-m", "tests.gpu.checks.methods", str(place.folder / "cpu"), *names],
                                 env=environment, cwd=ROOT, stdout=sys.stderr)
    try:
        ours = first_steps(names, place.folder / "gpu")
        broken = {name: found["errors"][-300:] for name, found in ours.items() if found["status"]}
        assert not broken, f"programs failed on the GPU: {broken}"
        if other is None:
            return {"programs": len(ours)}
        assert other.wait() == 0, "the programs failed on the CPU"
    finally:
        if other is not None:
            other.kill()
    theirs = torch.load(place.folder / "cpu" / "steps.pt", weights_only=True)
    apart = {name: compare(ours[name], theirs[name]) for name in names}
    place.report(apart={name: [float(f"{value:.2g}") for value in pair] for name, pair in apart.items()})
    wrong = {name: pair for name, pair in apart.items() if not (pair[0] <= LOSS_APART and pair[1] <= UPDATE_APART)}
    assert not wrong, f"loss and update apart: {wrong}"
    return {"programs": len(apart)}


def first_steps(names: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    """Run one step of programs; return what each left as plain values."""
    found = {}
    for name in names:
        with SameDraws():
            found[name] = vars(run(name, folder / name, 1, flags_of(name, FP32), record=True))
    return found


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Return how far apart the losses and the updates of the weights are, as shares of them."""
    losses = [(a[key], b[key]) for a, b in zip(ours["logged"], theirs["logged"], strict=True)
              for key in a.keys() & b.keys() if "loss" in key]
    loss = max((abs(a - b) / max(abs(b), 1e-3) for a, b in losses), default=0.0)
    moved = {name: theirs["after"][name] - theirs["before"][name] for name in theirs["after"]}
    missed = {name: ours["after"][name] - theirs["after"][name] for name in theirs["after"]}
    return loss, norm(missed) / max(norm(moved), 1e-12)


def norm(values: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([value.square().sum() for value in values.values()]).sum().sqrt())


def waits(place: Place) -> dict[str, Any]:
    """No step makes the host wait: PyTorch raises where one would. The first may fill caches."""
    @contextlib.contextmanager
    def strictly(run: Run, step: int) -> Iterator[None]:
        # An evaluation may follow the last step, inside the loop.
        torch.cuda.set_sync_debug_mode("error" if 3 <= step < 5 else "default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    names, waiting = names_of(place), {}
    for name in names:
        found = run(name, place.folder / name, 7, around=strictly)
        torch.cuda.set_sync_debug_mode("default")
        if found.status and not PROGRAMS[name].waits:
            waiting[name] = found.errors[-400:]
    assert not waiting, waiting
    return {"programs": len(names)}


def memory(place: Place) -> dict[str, Any]:
    """Where the memory is used up in a step, a program ends with one line that names a flag to lower; where it was too
    small from the start, with one line that blames no other flag."""
    total = torch.cuda.get_device_properties(0).total_memory

    def fill() -> list[torch.Tensor]:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(max(torch.cuda.memory_reserved() / total, 1e-6))
        held = []
        for size in (2**20, 2**16, 512):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        return held

    @contextlib.contextmanager
    def little(run: Run, step: int) -> Iterator[None]:
        held = fill()
        yield
        held.clear()

    def remedy(name: str, folder: Path, around: Around | None) -> str:
        held = [] if around else fill()
        try:
            found = run(name, folder, 5, around=around)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        held.clear()
        torch.cuda.empty_cache()
        lines = [line for line in found.errors.splitlines() if line.startswith("error: ")]
        assert found.status == 2 and len(lines) == 1 and "out of memory" in lines[0], (name, found.errors[-400:])
        return lines[0].partition("; ")[2]

    said = {name: remedy(name, place.folder / name, little) for name in EAGER}
    named = re.compile(r"lower .*(--[a-z]|[A-Z]+[._][A-Z])")
    helpless = {name: words for name, words in said.items() if not named.match(words)}
    assert not helpless, helpless
    for name in FAMILIES:
        remedy(name, place.folder / "none" / name, None)
    return {"programs": len(said), "remedies": sorted(set(said.values()))}


def resume(place: Place) -> dict[str, Any]:
    """A run that is stopped by a signal and started again ends with the same bits, with --strict."""
    @contextlib.contextmanager
    def stopped(run: Run, step: int) -> Iterator[None]:
        yield
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    differ = []
    for name in FAMILIES[:3]:
        flags = flags_of(name, STRICT)
        whole = run(name, place.folder / "whole" / name, 5, flags)
        part = run(name, place.folder / "part" / name, 5, flags, around=stopped)
        rest = run(name, place.folder / "part" / name, 5, flags)
        runs = (whole, part, rest)
        assert [one.status for one in runs] == [0, 143, 0], [one.errors[-300:] for one in runs]
        if any(not torch.equal(whole.after[key], rest.after[key]) for key in whole.after):
            differ.append(name)
    place.check(not differ, f"not the same bits: {differ}")
    return {"programs": len(FAMILIES[:3])}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    torch.save(first_steps(tuple(sys.argv[2:]), target), target / "steps.pt")
