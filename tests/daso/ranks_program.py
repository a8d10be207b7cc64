"""Two iterations of every learner with a state, in as many processes as torchrun starts; rank 0 saves the results.

    torchrun --nproc_per_node=2 tests/daso/ranks_program.py FILE
"""
from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from DASO.lib.algorithm.interface import Draws
from DASO.lib.config.config import parse
from DASO.lib.data.sets import load_data
from DASO.lib.trainer import Trainer
from shared import distributed
from shared.distributed import World
from tests.daso.small import LEARNERS, command

STEPS = 3
# Nearly no learning: what is compared are the states and the losses of steps from nearly equal weights.
KEYS = {"SOLVER.BASE_LR": 1e-4, "ALGORITHM.CREST.GEN_PERIOD_STEPS": 2, "SOLVER.MAX_ITER": 4, "STRICT": True}


def results(world: World) -> dict[str, Any]:
    """Return for every learner its losses, its state, the weights and what the labelled set became."""
    found = {}
    for name, (config, keys) in LEARNERS.items():
        cfg, _ = parse(command(config, Path("unused"), {**keys, **KEYS}))
        trainer = Trainer(cfg, load_data(cfg), world, Path("."))
        trainer.run = SimpleNamespace(print=lambda text: None)
        trainer.algorithm.begin(trainer)
        losses = []
        for it in range(STEPS):
            _, values = trainer.step(trainer.batches(it), it, Draws(cfg.SEED, it, world))
            logged = [value for key, value in values.items() if "loss" in key]
            losses.append(distributed.mean(torch.stack(logged), world))
            trainer.algorithm.after_iteration(trainer, it)
        found[name] = {"losses": torch.stack(losses) if len({len(part) for part in losses}) == 1 else losses[-1],
                       "state": trainer.algorithm.state_dict(), "labelled": trainer.batches.state_dict(),
                       "model": {key: value.clone() for key, value in trainer.model.state_dict().items()}}
    return found


def main() -> None:
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    found = results(world)
    if world.main:
        torch.save(found, sys.argv[1])
    distributed.stop()


if __name__ == "__main__":
    main()
