"""Network snapshots: ours, and those that the published EDM and TDSM code wrote.

Our `network-snapshot-NNNNNN.pkl` keeps the published name and is a plain torch.save of numbers, text and tensors, which
`torch.load(file, weights_only=True)` reads:

    format         "fewlabel network snapshot"
    class_name     EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond, a classifier of EDM/tdsm/classifiers.py or CAS_class
    init_kwargs    its constructor keywords
    state_dict     its tensors, float32 on the CPU (the EMA of a training run)
    dataset_kwargs what it was trained on; label_counts and class_names, or label_vectors, say which labels occurred
    loss_kwargs    of TDSM: the label noise it was trained for, `transition_matrix` among it

`.safetensors` files hold the same, with all but the tensors as JSON in the header, and a SHA-256 of it. Reading any of
the formats runs nothing that the file brings along.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.modules.module import register_module_parameter_registration_hook

from EDM.training.networks import PRECONDITIONERS
from EDM.training.published import Record, describe, is_plain, local_file, read_pickle, read_zip
from shared.cli import UserError, is_out_of_memory, nearest
from shared.training.checkpoint import check_finite
from shared.training.files import atomic

FORMAT = "fewlabel network snapshot"
MAX_HEADER, MAX_TENSORS = 1 << 25, 10_000  # of a .safetensors file; a transition matrix is part of the header
Networks = Mapping[str, Callable[..., torch.nn.Module]]  # by class name


@dataclass(frozen=True)
class Snapshot:
    """A network as data. `source` names the file in messages."""

    class_name: str
    init_kwargs: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = "snapshot"
    loss_kwargs: dict[str, Any] = field(default_factory=dict)

    def expect(self, networks: Networks, what: str) -> Snapshot:
        """Return the snapshot itself; raise UserError unless its network is one of `networks`, which are `what`."""
        if self.class_name not in networks:
            raise UserError(f"{self.source}: holds a {self.class_name}{nearest(self.class_name, networks)}, "
                            f"expected {what} ({', '.join(networks)})")
        return self

    def build(self, networks: Networks = PRECONDITIONERS, what: str = "a denoiser") -> torch.nn.Module:
        """Return the network in eval mode, float32 on the CPU, without gradients. Raises UserError; see `expect`."""
        self.expect(networks, what)
        try:
            with torch.device("meta"), at_most(self.state_dict):  # before any memory is taken
                networks[self.class_name](**self.init_kwargs)
            with torch.random.fork_rng(devices=[]):  # initial weights are drawn only to be replaced
                net = networks[self.class_name](**self.init_kwargs)
        except TooLarge:
            raise UserError(f"{self.source}: snapshot of another network, its constructor arguments describe a far "
                            f"larger one than its {len(self.state_dict)} tensors") from None
        except (UserError, TypeError, ValueError, RuntimeError, KeyError, IndexError, ArithmeticError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"{self.source}: no {self.class_name} can be made from its constructor arguments "
                            f"({error})") from None
        load_weights(net, self.state_dict, self.source)
        net.loss_kwargs = dict(self.loss_kwargs)  # says of a denoiser whether it was trained from noisy labels
        net.dataset_kwargs = dict(self.dataset_kwargs)  # says which classes occurred
        return net.eval().requires_grad_(False)


class TooLarge(Exception):
    """A network is far larger than the tensors for it."""


@contextmanager
def at_most(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Raise TooLarge as soon as a network that is built in this context is far larger than the tensors for it.

    What is a little larger gets through, to `load_weights`, which names the difference.
    """
    left = {"tensors": 100 + 2 * len(tensors),
            "numbers": 1_000_000 + 2 * sum(tensor.numel() for tensor in tensors.values())}

    def count(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            left["tensors"] -= 1
            left["numbers"] -= parameter.numel()
            if min(left.values()) < 0:
                raise TooLarge

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def load_weights(net: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str, *, strict: bool = True,
                 what: str = "snapshot", advice: str = "") -> None:
    """Copy `tensors` into the parameters and buffers of `net` by name.

    strict: every name has to occur on both sides; otherwise only names that occur on both are copied. Raises UserError,
    which calls the source `what`, for a missing or superfluous name (strict) and for a different shape; `net` is then
    unchanged.
    """
    own = net.state_dict()
    missing, extra = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    if strict and (missing or extra):
        first = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the network has not"
        raise UserError(f"{source}: {what} of another network, it {first} "
                        f"({len(missing)} tensors missing, {len(extra)} superfluous){advice}")
    shared = [name for name in own if name in tensors]
    for name in shared:
        if own[name].shape != tensors[name].shape:
            raise UserError(f"{source}: {what} of another network, {name} has shape {tuple(tensors[name].shape)}, "
                            f"expected {tuple(own[name].shape)}{advice}")
    check_finite({name: tensors[name] for name in shared}, source)
    net.load_state_dict({name: tensors[name] for name in shared}, strict=False)


def load_network(path: str | os.PathLike, device: str | torch.device = "cpu") -> torch.nn.Module:
    """Return the denoiser of a snapshot (path or URL, any format) on `device`: eval mode, float32, no gradients.

    Raises UserError when the file is missing, damaged, hostile, no snapshot, or holds a classifier.
    """
    return read_snapshot(path).build().to(device)


def save_snapshot(path: str | os.PathLike, net: torch.nn.Module,
                  dataset_kwargs: Mapping[str, Any] | None = None,
                  loss_kwargs: Mapping[str, Any] | None = None) -> None:
    """Write `net` (of a training run, the EMA) to `path`: complete or not at all."""
    write_snapshot(path, Snapshot(type(net).__name__, dict(net.init_kwargs), net.state_dict(),
                                  dict(dataset_kwargs or {}), str(path), dict(loss_kwargs or {})))


def write_snapshot(path: str | os.PathLike, snapshot: Snapshot) -> None:
    """Write a snapshot as `.safetensors` when `path` ends so, and in our `.pkl` form otherwise."""
    about = dict(class_name=snapshot.class_name, init_kwargs=_plain(snapshot.init_kwargs),
                 dataset_kwargs=_plain(snapshot.dataset_kwargs),
                 **(dict(loss_kwargs=_plain(snapshot.loss_kwargs)) if snapshot.loss_kwargs else {}))
    tensors = {name: _stored(tensor) for name, tensor in snapshot.state_dict.items()}
    if Path(path).suffix == ".safetensors":
        data = save(tensors, dict(format=FORMAT, about=json.dumps(about), sha256=_digest(about, tensors)))
        with atomic(path) as file:
            file.write(data)
    else:
        with atomic(path) as file:
            torch.save(dict(format=FORMAT, **about, state_dict=tensors), file)


def read_snapshot(path: str | os.PathLike) -> Snapshot:
    """Read a snapshot, ours or published, from a path or URL without running anything in it. Raises UserError."""
    file = local_file(path)
    try:
        with open(file, "rb") as stream:
            start = stream.read(9)
            stream.seek(0)
            if start[:4] == b"PK\3\4":
                return _from_torch(file, str(path))
            if start[8:9] == b"{":
                return _from_safetensors(file, str(path))
            content = read_pickle(stream, str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if "ema" not in content:
        raise UserError(f"{path}: holds no network under the key ema; expected a network snapshot")
    network = describe(content["ema"], str(path))
    dataset = content.get("dataset_kwargs")
    dataset = dict(dataset) if isinstance(dataset, dict) and is_plain(dataset) else {}
    loss = content.get("loss_fn")
    settings = {name: value for name, value in loss.state.items() if is_plain(value)} \
        if isinstance(loss, Record) and loss.class_name else {}
    return Snapshot(network.class_name, network.init_kwargs, network.tensors, dataset, str(path), settings)


def load_training_state(path: str | os.PathLike) -> dict[str, Any]:
    """Read a training-state-*.pt, ours or published: `net` (name -> tensor) and `optimizer_state` (of Adam).

    Raises UserError when the file is missing, damaged, hostile or something else.
    """
    content = read_zip(local_file(path))
    if not {"net", "optimizer_state"} <= content.keys() or not isinstance(content["optimizer_state"], dict):
        raise UserError(f"{path}: expected a training state with the keys net and optimizer_state")
    net = content["net"]
    tensors = describe(net, str(path)).tensors if isinstance(net, Record) else net
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path}: its entry net holds no network")
    return dict(content, net=dict(tensors))


def digest(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file (path or URL) in hexadecimal."""
    with open(local_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_torch(file: Path, source: str) -> Snapshot:
    content = read_zip(file)
    if {"net", "optimizer_state"} <= content.keys():
        raise UserError(f"{source}: is a training state; give the network-snapshot-*.pkl beside it")
    if content.get("format") != FORMAT:
        raise UserError(f"{source}: not a network snapshot (it lacks the entry format: {FORMAT!r})")
    return _checked(content, content.get("state_dict"), source)


def _from_safetensors(file: Path, source: str) -> Snapshot:
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER or stream.read(length).count(b'"data_offsets"') > MAX_TENSORS:
            raise UserError(f"{source}: refused, a header of {length} bytes with endlessly many tensors is none of a "
                            "network snapshot")
    try:
        with safe_open(file, framework="pt") as content:
            header = content.metadata() or {}
            about = json.loads(header.get("about", "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{source}: cut short or not a network snapshot ({error})") from None
    if header.get("format") != FORMAT:
        raise UserError(f"{source}: not a network snapshot (its header lacks the entry format: {FORMAT!r})")
    snapshot = _checked(about, tensors, source)
    if header.get("sha256", "") not in ("", _digest(about, tensors)):
        raise UserError(f"{source}: damaged, its tensors do not match their checksum")
    return snapshot


def _checked(about: Any, tensors: Any, source: str) -> Snapshot:
    kinds = dict(class_name=str, init_kwargs=dict, dataset_kwargs=dict, loss_kwargs=dict)
    if isinstance(about, dict):
        about = {"loss_kwargs": {}, **about}
    for name, kind in kinds.items():
        if not isinstance(about, dict) or not isinstance(about.get(name), kind) or not is_plain(about[name]):
            raise UserError(f"{source}: its entry {name} is missing or malformed")
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{source}: its entry state_dict is missing or malformed")
    return Snapshot(about["class_name"], about["init_kwargs"], tensors, about["dataset_kwargs"], source,
                    about["loss_kwargs"])


def _digest(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of what a `.safetensors` file holds, which the format itself does not check."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the CPU; floating-point tensors become float32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def _plain(value: Any) -> Any:
    """Return `value` with tuples as lists; raise TypeError for anything that is not a number, text, list or dict."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not is_plain(value):
        raise TypeError(f"a snapshot holds plain values only, not {type(value).__name__}")
    return value
