"""Files of weights: ours and the published ones; and the configuration beside them."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from DASO.lib.config.config import Config, dump
from DASO.lib.models.ema import as_counters
from shared.cli import UserError
from shared.distributed import World
from shared.training.checkpoint import read_checkpoint, weights_in, write_checkpoint
from shared.training.files import atomic
from shared.training.run import Run

if TYPE_CHECKING:
    from DASO.lib.trainer import Trainer


def write_config(cfg: Config, folder: Path, world: World) -> None:
    """Write config.yaml, which `--config-file` reads again."""
    if world.main:
        with atomic(folder / "config.yaml", "w") as file:
            file.write(dump(cfg))


def write_weights(trainer: Trainer, path: Path, state: Mapping[str, Any]) -> None:
    """Write a published form of checkpoint: networks, optimiser, schedule and `meta`."""
    write_checkpoint(path, {
        "model": trainer.model.state_dict(), "ema_model": trainer.ema.state_dict() if trainer.ema else None,
        "optimizer": trainer.optimizer.state_dict(), "scheduler": trainer.scheduler.state_dict(),
        "meta": trainer.meta(state)})
    path.with_name(path.name + ".previous").unlink(missing_ok=True)


def load_weights(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Load the networks of a checkpoint, ours or a published one; return its content. UserError."""
    content = read_checkpoint(path)
    if "model" not in content:
        raise UserError(f"{path}: it holds no `model`; expected a checkpoint of this program")
    load_state(trainer.model, weights_in(content, "model", path), path, "model")
    if trainer.ema is not None:
        average = "ema_model" if content.get("ema_model") else "model"
        load_state(trainer.ema.module, weights_in(content, average, path), path, "ema_model")
    return content


def load_state(net: torch.nn.Module, state: Mapping[str, Any], path: Path, name: str) -> None:
    """Load a state dict; UserError that names the first difference."""
    state, ours = as_counters(state), net.state_dict()
    differing = next((key for key in ours if key in state and state[key].shape != ours[key].shape), None)
    if differing is not None:
        raise UserError(f"{path}: {name}.{differing} is {list(state[differing].shape)} there, "
                        f"{list(ours[differing].shape)} here; set MODEL.* and ALGORITHM.* as in its training")
    odd = sorted(set(ours) ^ set(state))
    if odd:
        where = "the network" if odd[0] in ours else "the file"
        raise UserError(f"{path}: {name}.{odd[0]} is in {where} alone; set MODEL.* and ALGORITHM.* as in its training")
    net.load_state_dict(state)


def load_foreign(trainer: Trainer, run: Run, path: str) -> None:
    """Start a run from RESUME: all of a checkpoint of ours, or weights, optimiser and iteration of a published one.

    What published files lack (queues, estimates, histories) starts empty.
    """
    content = load_weights(trainer, Path(path))
    if "algorithm" in content:
        run.restore(content, Path(path))
        return
    iteration = int(content.get("meta", {}).get("iter", 0))
    try:
        if content.get("optimizer"):
            trainer.optimizer.load_state_dict(content["optimizer"])
        if content.get("scheduler"):
            trainer.scheduler.load_state_dict(content["scheduler"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"RESUME {path}: its optimiser does not fit SOLVER.*: {' '.join(str(error).split())[:120]}"
                        ) from None
    run.step = iteration
    run.log.print(f"RESUME {path}: weights, optimiser and iteration {iteration}; queues and statistics start empty")
