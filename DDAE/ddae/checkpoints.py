"""Checkpoints `{save_dir}/ckpts/model_{epoch}.pth`: the published ones and ours, which hold the same entries.

MODEL: the network's tensors as `module.nn_model.*`. EMA: `initted`, `step` and `ema_model.nn_model.*` (published files
repeat the network there as `online_model.*`). opt: Adam's state, numbered in the order in which the parameters are
registered. Ours have `config` and `epoch` besides.
"""
from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from DDAE.ddae.config import Config, make_diffusion, make_network
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from shared.training.files import atomic

if TYPE_CHECKING:
    from DDAE.ddae.diffusion import DDPM, EDM
    from DDAE.ddae.model import UNet

ONLINE, AVERAGED = "module.nn_model.", "ema_model.nn_model."
# What a published file may begin the names of a network with, longest first.
ONLINE_PREFIXES = (ONLINE, "nn_model.", "module.")
AVERAGED_PREFIXES = ("ema_model.module.nn_model.", AVERAGED, "ema_model.")
# What must agree between a checkpoint and the config that reads it.
LISTED_EPOCHS = 20
NETWORK_KEYS = ("model_type", "net_type", "network", "diffusion")


def checkpoint_path(config: Config, epoch: int) -> Path:
    return Path(config.save_dir) / "ckpts" / f"model_{epoch}.pth"


def saved_epochs(config: Config) -> list[int]:
    """Return the epochs of which there are checkpoints, rising."""
    found = (re.fullmatch(r"model_(\d+)\.pth", path.name) for path in checkpoint_path(config, 0).parent.glob("*.pth"))
    return sorted(int(match[1]) for match in found if match)


def find_checkpoint(config: Config, epoch: int = -1) -> tuple[Path, int]:
    """Return (file, epoch) of an epoch, -1 for the last of the config; UserError names the epochs there are."""
    epoch = config.n_epoch - 1 if epoch == -1 else epoch
    path = checkpoint_path(config, epoch)
    if not path.is_file():
        epochs = saved_epochs(config)
        if not epochs:
            raise UserError(f"--epoch: no checkpoint {path}, and none of another epoch; train it first, or put a "
                            "published file there")
        earlier = " (and earlier ones)" if len(epochs) > LISTED_EPOCHS else ""
        raise UserError(f"--epoch: no checkpoint {path}; there are the epochs "
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
    load_weights(net, averaged_weights(read_model(path, config), path), path)
    return net.eval().requires_grad_(False).to(device), make_diffusion(config, **options)


def read_model(path: Path, config: Config) -> dict[str, Any]:
    """Return the content of a checkpoint; UserError if it is none, or tells that it belongs to another config."""
    content = read_checkpoint(path)
    if "MODEL" not in content and "EMA" not in content:
        raise UserError(f"{path}: not a checkpoint of this kind (it lacks the entries MODEL and EMA)")
    saved = content.get("config")
    if isinstance(saved, dict):
        ours = config.to_dict()
        for key in NETWORK_KEYS:
            if saved.get(key) != _plain(ours[key]):
                what = _difference(saved.get(key), _plain(ours[key]), key)
                raise UserError(f"{path}: made with another config than {config.source} ({what})")
    return content


def averaged_weights(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the averaged network under their plain names."""
    return _stripped(content.get("EMA"), AVERAGED_PREFIXES, "EMA", path)


def online_weights(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the trained network under their plain names."""
    return _stripped(content.get("MODEL"), ONLINE_PREFIXES, "MODEL", path)


def average_updates(content: Mapping[str, Any]) -> int:
    """Return how often the average was updated; published counters are scalars or have shape [1]."""
    step = content["EMA"].get("step", 0)
    return int(step.reshape(-1)[0]) if isinstance(step, torch.Tensor) else int(step)


def load_weights(net: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load tensors by name; UserError for a missing, superfluous or differently shaped one. `net` is then unchanged."""
    own = net.state_dict()
    missing, extra = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which this network has not"
        raise UserError(f"{path}: checkpoint of another network, it {what} ({len(missing)} tensors missing, "
                        f"{len(extra)} superfluous); give the config that it was trained with")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(f"{path}: checkpoint of another network, {name} has shape {tuple(tensors[name].shape)}, "
                            f"expected {tuple(tensor.shape)}; give the config that it was trained with")
    net.load_state_dict(dict(tensors))


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


def write_model(path: Path, net: torch.nn.Module, average: torch.nn.Module, updates: int,
                optimizer: torch.optim.Optimizer, config: Config, epoch: int) -> None:
    """Write a checkpoint, complete or not at all."""
    ema = {"initted": torch.tensor(True), "step": torch.tensor(updates)}
    ema.update(_prefixed(average, AVERAGED))
    state = optimizer.state_dict()
    state["state"] = {number: {name: _stored(value) for name, value in entry.items()}
                      for number, entry in state["state"].items()}
    with atomic(path) as file:
        torch.save({"MODEL": _prefixed(net, ONLINE), "EMA": ema, "opt": state, "config": _plain(config.to_dict()),
                    "epoch": epoch}, file)


def _prefixed(net: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: _stored(tensor) for name, tensor in net.state_dict().items()}


def _stored(value: Any) -> Any:
    """Return a tensor on the CPU, in plain memory order, of its own."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _stripped(tensors: Any, prefixes: tuple[str, ...], entry: str, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: lacks the entry {entry}")
    for prefix in prefixes:
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                 if isinstance(name, str) and name.startswith(prefix) and isinstance(tensor, torch.Tensor)}
        if found:
            return found
    raise UserError(f"{path}: its entry {entry} holds no network (no name begins with {prefixes[0]})")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _difference(saved: Any, ours: Any, key: str) -> str:
    if not (isinstance(saved, dict) and isinstance(ours, dict)):
        return f"{key} is {saved!r} there and {ours!r} here"
    inner = next(name for name in [*saved, *ours] if saved.get(name) != ours.get(name))
    return f"{key}.{inner} is {saved.get(inner)!r} there and {ours.get(inner)!r} here"
