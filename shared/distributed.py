"""One process or many: the world that torchrun describes, and the few collectives that training needs."""
from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shared.cli import Diverged, UserError
from shared.training.batchnorm import GlobalBatchNorm

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among all: its rank in 0..size-1, its rank on this machine and its device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def slice(self, count: int) -> slice:
        """Return this rank's contiguous part of a global batch of `count`; UserError when ranks cannot share evenly."""
        if count % self.size:
            raise UserError(f"a batch of {count} cannot be shared evenly by {self.size} processes")
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


def start(device: str | None = None) -> World:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or be alone without a process group.

    `device`: "cpu", "cuda", "cuda:1" or None for a GPU if available. Raises UserError if a machine has
    fewer GPUs than processes, or lacks the device.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    here = _device(device, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if size > 1 and not dist.is_initialized():
        # Under torchrun, its store; otherwise one that ends with its processes.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", rank=rank, world_size=size,
                                store=_fresh_store(rank, size) if kept else None)
    return World(rank, size, local_rank, here)


def _fresh_store(rank: int, size: int) -> dist.Store:
    """Return torchrun's store below a prefix that only the processes started together with this one know.

    torchrun keeps its store when it starts all processes again (--max-restarts), with the addresses of dead processes
    in it, for which a new one would wait forever. So rank 0 answers each call with its own name until all have it.
    """
    # As long as torch waits for the others itself: rank 0 may decode a data set before it comes here.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          timeout=timedelta(minutes=30))
    name = uuid.uuid4().hex
    if rank:
        store.set(f"call/{rank}", name)
        name = store.get(f"answer/{rank}/{name}").decode()
        store.add(f"{name}/joined", 1)
        return dist.PrefixStore(name, store)
    while store.add(f"{name}/joined", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"call/{other}"]):
                store.set(f"answer/{other}/{store.get(f'call/{other}').decode()}", name)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def _device(asked: str | None, local_rank: int, local_size: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        asked = "cuda" if gpus else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {asked!r}: expected cpu, cuda or cuda:N")
    if device.type != "cuda":
        return device
    if device.index is not None and local_size == 1:
        if device.index >= gpus:
            raise UserError(f"device {asked} was asked for, but this machine has {gpus} GPU(s); choose another, or cpu")
        return device
    if gpus < local_size:
        raise UserError(f"{local_size} GPU(s) were asked for on this machine, but it has {gpus}; "
                        "start fewer processes, or compute on the CPU")
    return torch.device("cuda", local_rank)


def stop() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        time.sleep(0.1)  # gloo's threads may need Python's lock, which the next line holds; otherwise a deadlock
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


@torch.no_grad()
def all_sum(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Return the sum over ranks, without gradient; the tensor itself for one rank."""
    if world.size == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def sum_with_gradient(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Return the sum over ranks; its gradient reaches every rank's part."""
    if world.size == 1:
        return tensor
    # All ranks descend the same loss of the sum, and gradients are averaged over ranks: the identity, times ranks for
    # that average, lets each part count once.
    return all_sum(tensor, world) + (tensor - tensor.detach()) * world.size


def mean(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Return the mean over ranks, without gradient; the tensor itself for one rank."""
    return all_sum(tensor, world) / world.size if world.size > 1 else tensor.detach()


@torch.no_grad()
def gather(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Concatenate the equally shaped tensors of all ranks along dimension 0, in rank order, without gradient."""
    if world.size == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def check_equal(tensors: Mapping[str, torch.Tensor], world: World, when: str) -> None:
    """Raise Diverged, naming tensor and rank, unless all ranks hold the same bits (with near certainty)."""
    if world.size == 1 or not tensors:
        return
    found = gather(torch.stack([_checksum(tensor) for tensor in tensors.values()])[None], world)
    for rank, number in (found != found[0]).nonzero().tolist():
        raise Diverged(f"{list(tensors)[number]} differs between ranks 0 and {rank} {when}")


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return an int64 scalar that any single changed element changes."""
    bits = tensor.detach().contiguous().flatten()
    bits = bits.view({1: torch.uint8, 2: torch.int16}.get(tensor.itemsize, torch.int32)).to(torch.int32)
    # Weighted by place, so that exchanged values are noticed; by odd numbers, so that no bit is multiplied away.
    return (bits * torch.arange(1, 2 * len(bits), 2, dtype=torch.int32, device=bits.device)).sum(dtype=torch.int64)


def broadcast_value(value: Any, world: World) -> Any:
    """Return rank 0's picklable `value` on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], Result], world: World) -> Result:
    """Return rank 0's result of `action` to every rank; its UserError ends all ranks and is reported once."""
    result, error = None, None
    if world.main:
        try:
            result = action()
        except UserError as mistake:
            error = mistake
    result, failed = broadcast_value((result, error is not None), world)
    if error is not None:
        raise error
    if failed:
        sys.exit(2)
    return result


def data_parallel(net: torch.nn.Module, world: World) -> torch.nn.Module:
    """Give all ranks the weights of rank 0, and wrap `net` so that gradients are averaged; one rank: `net` itself.

    Buffers are not broadcast at each forward: state that has to agree is computed from the global batch.
    """
    if world.size == 1:
        return net
    with torch.no_grad():
        for tensor in net.state_dict().values():
            value = tensor.contiguous()  # a collective refuses the memory of a channels_last weight
            dist.broadcast(value, src=0)
            tensor.copy_(value)
    ids = [world.device] if world.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False,
                                                     gradient_as_bucket_view=True)


def sync_batchnorm(net: torch.nn.Module, world: World) -> torch.nn.Module:
    """Make every batch norm of `net` use the statistics of the global batch; return the network.

    The layers are replaced in place and keep their names, parameters and buffers (a network that is itself a batch norm
    is returned replaced). With one rank nothing changes. Convert before `data_parallel`.
    """
    if world.size == 1:
        return net
    if isinstance(net, torch.nn.modules.batchnorm._BatchNorm):
        return GlobalBatchNorm.take_over(net)
    for name, child in net.named_children():
        setattr(net, name, sync_batchnorm(child, world))
    return net


def unwrap(net: torch.nn.Module) -> torch.nn.Module:
    """Return the network without data-parallel and compile wrappers."""
    while True:
        if isinstance(net, torch.nn.parallel.DistributedDataParallel):
            net = net.module
        elif hasattr(net, "_orig_mod"):
            net = net._orig_mod
        else:
            return net
