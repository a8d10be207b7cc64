"""Runs training programs of tests/gpu/programs.py in this process and watches their steps."""
from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shared.training.log import Log
from shared.training.run import Run
from tests.gpu.programs import PROGRAMS, ROOT

Around = Callable[[Run, int], contextlib.AbstractContextManager]


@dataclass
class Outcome:
    """What a program left: its exit status, what it said on stderr, the numbers that it logged step by step, and the
    kept networks' weights before and after, in float64 on the CPU."""

    status: int = 0
    errors: str = ""
    logged: list[dict[str, float]] = field(default_factory=list)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)


def run(name: str, folder: Path, steps: int, flags: Sequence[str] = (), *, around: Around | None = None,
        record: bool = False) -> Outcome:
    """Run a program for `steps` steps in `folder`, which may hold its earlier run, with further flags.

    The program ends after these steps, with status 0. around: (run, step) -> the context of that step. record: keep
    what is logged, which waits for the device.
    """
    program, outcome = PROGRAMS[name], Outcome()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*program.args(folder, steps), *flags]
    if not torch.cuda.is_available():
        arguments = [argument for argument in arguments if argument != "--gpu"]
    before, place, path = sys.argv, Path.cwd(), sys.path[0]
    sys.argv, sys.path[0] = [str(ROOT / program.script), *arguments], str((ROOT / program.script).parent)
    os.chdir(folder)
    errors = io.StringIO()
    try:
        with watched(outcome, around, record, steps), contextlib.redirect_stderr(errors):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                outcome.status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except Exception:  # noqa: BLE001 - whatever ends a program is part of what is measured
                outcome.status = 1
                traceback.print_exc()
    finally:
        outcome.errors = errors.getvalue()
        sys.argv, sys.path[0] = before, path
        os.chdir(place)
    return outcome


@contextlib.contextmanager
def watched(outcome: Outcome, around: Around | None, record: bool, last: int) -> Iterator[None]:
    """Note in `outcome` what runs in this context compute; end the program after `last` steps."""
    steps, add = Run.steps, Log.add

    def watched_steps(run: Run, total: int) -> Iterator[int]:
        outcome.before = outcome.before or weights(run)
        for step in steps(run, total):
            with around(run, step) if around is not None else contextlib.nullcontext():
                yield step
            if step + 1 == last:
                outcome.after = weights(run)
                sys.exit(0)
        outcome.after = weights(run)

    def watched_add(log: Log, **values: Any) -> None:
        outcome.logged.append({key: float(torch.as_tensor(value).float().mean()) for key, value in values.items()})
        add(log, **values)

    Run.steps, Log.add = watched_steps, watched_add if record else add
    try:
        yield
    finally:
        Run.steps, Log.add = steps, add


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().double().cpu() for name, tensor in run._tensors() if tensor.is_floating_point()}


class SameDraws(TorchFunctionMode):
    """Random numbers for GPUs are drawn on the CPU, by generators with the same seeds; so are masks of dropout."""

    FACTORIES = (torch.rand, torch.randn, torch.randint, torch.randperm)
    LIKE = {torch.rand_like: torch.Tensor.uniform_, torch.randn_like: torch.Tensor.normal_}
    IN_PLACE = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_, torch.Tensor.random_)

    def __init__(self) -> None:
        super().__init__()
        self.twins: dict[int, tuple[torch.Generator, torch.Generator]] = {}

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:
            kwargs["generator"] = self.twin(kwargs["generator"])
        if function in self.FACTORIES:
            device = kwargs.pop("device", None)
            drawn = function(*args, **kwargs)
            return drawn if device is None else drawn.to(device)
        if function in self.LIKE:
            fresh = torch.empty_like(args[0], device="cpu")
            return self.LIKE[function](fresh).to(args[0].device)
        if function in self.IN_PLACE and args[0].is_cuda:
            return args[0].copy_(function(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs))
        if function is F.dropout:
            x, p = args[0], kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            if not kwargs.get("training", args[2] if len(args) > 2 else True):
                return x
            return x * (torch.rand(x.shape) >= p).to(x) / (1 - p)
        return function(*args, **kwargs)

    def twin(self, generator: torch.Generator) -> torch.Generator:
        """Return the generator on the CPU that stands for one of a GPU."""
        if generator.device.type == "cpu":
            return generator
        if id(generator) not in self.twins:
            self.twins[id(generator)] = generator, torch.Generator().manual_seed(generator.initial_seed())
        return self.twins[id(generator)][1]
