"""What a training run starts from and leaves behind: transfer, resume, snapshots, training states."""
from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from EDM.training.order import InfiniteOrder
from EDM.training.snapshots import load_training_state, load_weights, read_snapshot, save_snapshot
from shared import distributed
from shared.cli import UserError
from shared.distributed import World
from shared.training.ema import EMA
from shared.training.files import atomic

LATEST = "network-snapshot-latest.pkl"


def load_start(options: Mapping[str, Any], net: torch.nn.Module, ema: EMA, optimizer: torch.optim.Optimizer,
               order: InfiniteOrder) -> int:
    """Load what --transfer or --resume name, if anything, and return the number of images seen so far.

    --transfer: weights of the snapshot into the network and its average, by name; counting starts from 0.
    --resume: a training state. One of ours holds the exact count, the average and the data order; one of the published
    code holds neither, so the average comes from the snapshot beside it and the count from the file's name.
    Raises UserError for a file that is missing, damaged or of another network.
    """
    snapshot, state_file = options.get("resume_pkl"), options.get("resume_state_dump")
    if state_file is None:
        if snapshot is not None:
            _copy_weights(snapshot, net, ema)
        return 0
    state = load_training_state(state_file)
    if "ema" in state:
        load_weights(ema.module, state["ema"], str(state_file))
    else:
        _copy_weights(snapshot, net, ema)
    load_weights(net, state["net"], str(state_file))
    try:
        optimizer.load_state_dict(state["optimizer_state"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{state_file}: its optimizer state does not fit this network ({error})") from None
    if "order" in state:
        order.load_state_dict(state["order"])
    return int(state.get("nimg", options["resume_kimg"] * 1000))


def _copy_weights(source: str, net: torch.nn.Module, ema: EMA) -> None:
    tensors = read_snapshot(source).state_dict
    if not set(tensors) & set(net.state_dict()):
        raise UserError(f"{source}: snapshot of another network, no tensor of it has a name of this one")
    for module in (net, ema.module):
        load_weights(module, tensors, source, strict=False)


def save_state(path: Path, net: torch.nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, order: InfiniteOrder,
               nimg: int) -> None:
    """Write all that `load_start` needs in order to go on exactly from image number `nimg`."""
    with atomic(path) as file:
        torch.save({"net": dict(net.state_dict()), "optimizer_state": optimizer.state_dict(),
                    "ema": dict(ema.state_dict()), "order": order.state_dict(), "nimg": nimg}, file)


def write_snapshots(folder: Path, name: str, ema: torch.nn.Module, dataset_kwargs: Mapping[str, Any],
                    world: World, loss_kwargs: Mapping[str, Any] | None = None) -> None:
    """Write the averaged network to `folder`/`name` and to network-snapshot-latest.pkl, once all ranks agree on it."""
    distributed.check_equal(ema.state_dict(), world, f"in the averaged network; nothing was written to {name}")
    if world.main:
        save_snapshot(folder / name, ema, dataset_kwargs, loss_kwargs)
        with open(folder / name, "rb") as source, atomic(folder / LATEST) as target:
            shutil.copyfileobj(source, target)

