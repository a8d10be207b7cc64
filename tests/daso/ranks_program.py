"""What torchrun starts to compare two processes with one.

    torchrun --nproc_per_node=2 tests/daso/ranks_program.py FILE              steps of every learner; rank 0 saves them
    torchrun --nproc_per_node=2 tests/daso/ranks_program.py --config-file ...                          main.py

Networks and images are in double precision: what then differs between runs is no matter of rounding.
"""
from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from DASO import main as program
from DASO.lib.algorithm.interface import Draws
from DASO.lib.config.config import parse
from DASO.lib.data.augment import Look
from DASO.lib.data.sets import load_data
from DASO.lib.trainer import Trainer
from shared import distributed
from shared.distributed import World
from tests.daso.small import LEARNERS, command

STEPS = 3
KEYS = {"ALGORITHM.CREST.GEN_PERIOD_STEPS": 2, "SOLVER.MAX_ITER": 4, "STRICT": True}


def in_double() -> None:
    """Let networks and views be float64 from here on."""
    new_model, view = Trainer.new_model, Look.view
    Trainer.new_model = lambda self, seed: new_model(self, seed).double()
    Look.view = lambda self, *given: view(self, *given).double()


def results(world: World) -> dict[str, Any]:
    """Return for every learner its losses, its state, the weights and what the labelled set became."""
    found = {}
    for name, (config, keys) in LEARNERS.items():
        cfg, _ = parse(command(config, Path("unused"), {**keys, **KEYS}))
        trainer = Trainer(cfg, load_data(cfg), world, Path("."))
        trainer.run = SimpleNamespace(log=SimpleNamespace(print=lambda text: None))
        losses = {}
        for it in range(STEPS):
            _, values = trainer.step(trainer.batches(it), it, Draws(cfg.SEED, it, world))
            losses |= {f"{key} {it}": distributed.mean(value, world) for key, value in values.items() if "loss" in key}
            trainer.algorithm.after_iteration(trainer, it)
        found[name] = {"losses": losses, "state": trainer.algorithm.state_dict(),
                       "labelled": trainer.batches.state_dict(),
                       "model": {key: value.clone() for key, value in trainer.model.state_dict().items()}}
    return found


def main() -> None:
    torch.set_num_threads(1)
    in_double()
    if len(sys.argv) > 2:
        program.main()
        return
    world = distributed.start("cpu")
    found = results(world)
    if world.main:
        torch.save(found, sys.argv[1])
    distributed.stop()


if __name__ == "__main__":
    main()
