"""Checkpoints `{save_dir}/ckpts/model_{epoch}.pth`: the published ones and ours, which hold the same entries; and the
snapshots of EDM/train.py, probed like a DDAE.

MODEL: the network's tensors as `module.nn_model.*`. EMA: `initted`, `step` and `ema_model.nn_model.*` (published files
repeat the network there as `online_model.*`). opt: Adam's state, numbered in the order in which the parameters are
registered. Ours have `config` and `epoch` besides.
"""
from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from DDAE.ddae.config import Config, make_diffusion, make_network
from DDAE.ddae.diffusion import DDPM, EDM, FEATURE_STEPS, pool
from DDAE.ddae.model import UNet, check_names
from EDM.training import snapshots
from EDM.training.networks import UNetBlock
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from shared.training.files import atomic

ONLINE, AVERAGED = "module.nn_model.", "ema_model.nn_model."
# Prefixes of a network's tensors in published files, longest first.
PREFIXES = {"MODEL": (ONLINE, "nn_model.", "module."),
            "EMA": ("ema_model.module.nn_model.", AVERAGED, "ema_model.")}
NETWORK_KEYS = ("model_type", "net_type", "network", "diffusion")  # must agree between a checkpoint and its config
LISTED_EPOCHS = 20
SIGMA_RANGE = (0.002, 80.0)  # of the levels at which a snapshot is probed, within what its network allows


def checkpoint_path(config: Config, epoch: int) -> Path:
    return Path(config.save_dir) / "ckpts" / f"model_{epoch}.pth"


def saved_epochs(config: Config) -> list[int]:
    """Return the epochs that have a checkpoint, rising."""
    found = (re.fullmatch(r"model_(\d+)\.pth", path.name) for path in checkpoint_path(config, 0).parent.glob("*.pth"))
    return sorted(int(match[1]) for match in found if match)


def find_checkpoint(config: Config, epoch: int = -1) -> tuple[Path, int]:
    """Return (file, epoch) of an epoch, -1 for the last of the config; UserError names the epochs there are."""
    epoch = config.n_epoch - 1 if epoch == -1 else epoch
    path = checkpoint_path(config, epoch)
    if not path.is_file():
        epochs = saved_epochs(config)
        if not epochs:
            raise UserError(f"there is no checkpoint {path}, and none of another epoch; train it first, or put a "
                            "published file there")
        earlier = " (and earlier ones)" if len(epochs) > LISTED_EPOCHS else ""
        raise UserError(f"there is no checkpoint {path}; there are the epochs "
                        f"{', '.join(map(str, epochs[-LISTED_EPOCHS:]))}{earlier}")
    return path, epoch


def load_model(config: Config, epoch: int = -1, device: str | torch.device = "cpu", **options: Any
               ) -> tuple[UNet, DDPM | EDM]:
    """Return the averaged network of a checkpoint, in eval mode and without gradients, and the diffusion model.

    epoch: -1 for the config's last. options: as for make_diffusion. Raises UserError for a missing epoch, a damaged
    file, or one of another config.
    """
    path, _ = find_checkpoint(config, epoch)
    net = make_network(config)
    load_weights(net, read_model(path, config), "EMA", path)
    return net.eval().requires_grad_(False).to(device), make_diffusion(config, **options)


def read_model(path: Path, config: Config) -> dict[str, Any]:
    """Return the content of a checkpoint; UserError for another kind of file, or one made with another config."""
    content = read_checkpoint(path)
    if "MODEL" not in content and "EMA" not in content:
        raise UserError(f"{path}: not a checkpoint of this kind (it lacks the entries MODEL and EMA)")
    saved = content.get("config")
    if isinstance(saved, dict):
        ours = config.to_dict()
        for key in NETWORK_KEYS:
            if saved.get(key) != ours[key]:
                raise UserError(f"{path}: made with another config than {config.source} "
                                f"({_difference(saved.get(key), ours[key], key)})")
    return content


def average_updates(content: Mapping[str, Any]) -> int:
    """Return how often the average was updated; published counters are scalars or have shape [1]."""
    step = content["EMA"].get("step", 0)
    return int(step.reshape(-1)[0]) if isinstance(step, Tensor) else int(step)


def load_weights(net: nn.Module, content: Mapping[str, Any], entry: str, path: Path) -> None:
    """Load the tensors of the entry MODEL or EMA by name; UserError, and an unchanged `net`, if they do not fit."""
    snapshots.load_weights(net, _plain_names(content.get(entry), entry, path), str(path), what="checkpoint",
                           advice="; give the config that it was trained with")


def load_optimizer(optimizer: torch.optim.Optimizer, content: Mapping[str, Any], path: Path) -> None:
    """Load Adam's moments; the rates and other settings remain those of this run."""
    saved = content.get("opt")
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        warnings.warn(f"{path} holds no optimizer state: Adam starts anew", stacklevel=2)
        return
    groups = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: its optimizer state does not fit this network ({error})") from None


def write_model(path: Path, net: nn.Module, average: nn.Module, updates: int, optimizer: torch.optim.Optimizer,
                config: Config, epoch: int) -> None:
    """Write a checkpoint, complete or not at all."""
    ema = {"initted": torch.tensor(True), "step": torch.tensor(updates), **_prefixed(average, AVERAGED)}
    state = optimizer.state_dict()
    state["state"] = {number: {name: _stored(value) for name, value in entry.items()}
                      for number, entry in state["state"].items()}
    with atomic(path) as file:
        torch.save({"MODEL": _prefixed(net, ONLINE), "EMA": ema, "opt": state, "config": config.to_dict(),
                    "epoch": epoch}, file)


def _prefixed(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: _stored(tensor) for name, tensor in net.state_dict().items()}


def _stored(value: Any) -> Any:
    """Return a copy of a tensor on the CPU, in plain memory order."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _plain_names(tensors: Any, entry: str, path: Path) -> dict[str, Tensor]:
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: lacks the entry {entry}")
    for prefix in PREFIXES[entry]:
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                 if isinstance(name, str) and name.startswith(prefix) and isinstance(tensor, Tensor)}
        if found:
            return found
    raise UserError(f"{path}: its entry {entry} holds no network (no name begins with {PREFIXES[entry][0]})")


def _difference(saved: Any, ours: Any, key: str) -> str:
    if isinstance(saved, dict) and isinstance(ours, dict):
        inner = next(name for name in [*saved, *ours] if saved.get(name) != ours.get(name))
        key, saved, ours = f"{key}.{inner}", saved.get(inner), ours.get(inner)
    return f"{key} is {saved!r} there and {ours!r} here"


# ---------------------------------------------------------------- snapshots of EDM, DPT and TDSM

class SnapshotNet(nn.Module):
    """A preconditioned EDM network whose decoder blocks can be asked for by the names out_1, out_2, ...

    Counted are the blocks that take a skip connection, in computing order; up-samplers and the two deepest blocks have
    no name. Conditional networks are asked without a class.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.image_shape = (net.img_channels, net.img_resolution, net.img_resolution)
        layers = [layer for name, layer in net.model.dec.items() if "_block" in name and isinstance(layer, UNetBlock)]
        self.blocks = {f"out_{number}": layer for number, layer in enumerate(layers, start=1)}
        self.widths = {name: layer.conv1.weight.shape[0] for name, layer in self.blocks.items()}

    def features(self, x: Tensor, sigma: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the outputs of the blocks `names` (None: all) for noisy images x [N, C, R, R] at levels sigma [N] or
        [1]. The pass ends with the last of them."""
        names = list(self.widths) if names is None else list(names)
        check_names(names, self.widths)
        kept: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor) -> None:
            kept[name] = output
            if len(kept) == len(set(names)):
                raise _LastBlockReached

        handles = [self.blocks[name].register_forward_hook(lambda *call, name=name: keep(name, call[-1]))
                   for name in set(names)]
        try:
            self.net(x, sigma)
        except _LastBlockReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: kept[name] for name in names}


class _LastBlockReached(Exception):
    pass


class SnapshotDiffusion(EDM):
    """The noise levels of EDM for a SnapshotNet, which does its own preconditioning."""

    def features(self, net: SnapshotNet, x01: Tensor, t: int | Tensor, noise: Tensor,
                 names: Sequence[str] | None = None, norm: bool = False, steps: int = FEATURE_STEPS
                 ) -> dict[str, Tensor]:
        """Return pooled outputs of the blocks `names` (None: all) for images noised to place t of the schedule."""
        noised, sigma = self.perturb(2 * x01 - 1, t, noise, steps)
        return pool(net.features(noised, sigma.flatten(), names), norm)


def load_snapshot(path: str | os.PathLike, device: str | torch.device = "cpu") -> tuple[SnapshotNet, SnapshotDiffusion]:
    """Return the network of a snapshot (file or URL) in eval mode without gradients, and its noise levels.

    Raises UserError for a file that is missing, damaged or no snapshot.
    """
    net = snapshots.load_network(path, device).eval().requires_grad_(False)
    low, high = max(SIGMA_RANGE[0], float(net.sigma_min)), min(SIGMA_RANGE[1], float(net.sigma_max))
    return SnapshotNet(net), SnapshotDiffusion(sigma_min=low, sigma_max=high)
