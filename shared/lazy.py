"""Modules that are imported at their first use or not at all, so that programs answer and start at once."""
from __future__ import annotations

import importlib.util
import sys
from functools import cache
from types import ModuleType


def lazy(name: str) -> ModuleType:
    """Return the top-level module `name`, which is loaded when one of its attributes is first asked for."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def optimizers_alone() -> None:
    """Keep torch's optimizers from importing torch.compile, a third of a training's start, when nothing is compiled.

    They import it to tell it to leave them alone: around the step, which is then under torch.no_grad alone, and around
    methods that look for the answer in `__dynamo_disable` first. Networks can be compiled as before; numbers are the
    same. Must come before the first optimizer is made; without effect where PyTorch is built otherwise.
    """
    import torch
    from torch.optim import SGD, Adam, AdamW, Optimizer

    if "torch._dynamo" in sys.modules:
        return
    for method in vars(Optimizer).values():
        if plain := getattr(method, "__wrapped__", None):
            plain.__dynamo_disable = plain
    for kind in (SGD, Adam, AdamW):
        if plain := getattr(vars(kind).get("step"), "__wrapped__", None):
            kind.step = torch.no_grad()(plain)
