"""Batch norm of the global batch: two ranks with half a batch each against one rank with all of it."""
from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from shared.cpu.batchnorm import BatchNorm2d
from shared.distributed import World, data_parallel, start, stop, sync_batchnorm
from shared.training.batchnorm import GlobalBatchNorm

BATCH, STEPS = 12, 3


def small_net(affine: bool = True, momentum: float | None = 0.1, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-3, momentum=momentum, affine=affine), nn.LeakyReLU(0.1),
        nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4, affine=affine), nn.Flatten(), nn.Linear(4 * 25, 5))
    return net.to(dtype)


def train(world: World, options: dict[str, Any], layout: torch.memory_format, splits: list[int]) -> dict[str, Any]:
    """Take a few steps on this rank's part; return what has to agree between one rank and several."""
    net = sync_batchnorm(small_net(**options), world).to(memory_format=layout)
    wrapped = data_parallel(net, world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    starts = [sum(splits[:rank]) for rank in range(world.size + 1)]
    part = slice(starts[world.rank], starts[world.rank + 1])
    logits = []
    for _ in range(STEPS):
        images = 100 + torch.randn(BATCH, 3, 5, 5, generator=generator)  # far from zero: sums of squares would cancel
        labels = torch.randint(0, 5, (BATCH,), generator=generator)
        images = images[part].to(net[0].weight.dtype, memory_format=layout).requires_grad_()
        output = wrapped(images)
        # A mean over the global batch, whatever the ranks' shares of it are.
        loss = F.cross_entropy(output, labels[part], reduction="sum") * world.size / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logits.append(output.detach())
    result = {"logits": torch.stack(logits), "input_gradient": images.grad / world.size,
              "gradients": [p.grad.clone() for p in net.parameters()],
              "state": {name: value.clone() for name, value in net.state_dict().items()}}
    net.eval()
    unseen = 100 + torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    result["eval"] = net(unseen.to(images.dtype)).detach()
    return result


def on_rank(rank: int, port: int, folder: str, cases: list[tuple]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = start("cpu")
    torch.save([train(world, *case) for case in cases], Path(folder) / f"{rank}.pt")
    stop()


CASES = {
    "halves": ({}, torch.contiguous_format, [6, 6]),
    "channels_last": ({}, torch.channels_last, [6, 6]),
    "unequal parts": ({}, torch.contiguous_format, [9, 3]),
    "no affine, cumulative average": ({"affine": False, "momentum": None}, torch.contiguous_format, [6, 6]),
    "float64": ({"dtype": torch.float64}, torch.contiguous_format, [9, 3]),
    "float64, cumulative average": ({"dtype": torch.float64, "momentum": None}, torch.channels_last, [6, 6]),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (port, str(folder), list(CASES.values())), nprocs=2)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name: str, two_ranks: dict[str, list[dict[str, Any]]]) -> None:
    options, layout, _ = CASES[name]
    alone = train(World(), options, layout, [BATCH])
    ranks = two_ranks[name]
    exact = options.get("dtype") == torch.float64
    close = {"rtol": 1e-9, "atol": 1e-10} if exact else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(torch.cat([r["logits"] for r in ranks], 1), alone["logits"], **close)
    torch.testing.assert_close(torch.cat([r["input_gradient"] for r in ranks]), alone["input_gradient"], **close)
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"], alone["gradients"], **close)
        assert list(rank["state"]) == list(alone["state"])
        torch.testing.assert_close(rank["state"], alone["state"], **close)
        torch.testing.assert_close(rank["eval"], alone["eval"], **close)
    assert ranks[0]["state"].keys() == ranks[1]["state"].keys()
    assert all(torch.equal(ranks[0]["state"][key], ranks[1]["state"][key]) for key in ranks[0]["state"])


def test_conversion_keeps_names_and_tensors() -> None:
    net = small_net()
    before = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert sync_batchnorm(net, World(0, 2)) is net
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert [type(layer) for layer in net if layer in (net[1], net[4])] == [GlobalBatchNorm, GlobalBatchNorm]
    assert (net[1].eps, net[1].momentum) == (1e-3, 0.1)


@pytest.fixture
def second_rank_missing() -> Iterator[World]:
    """A process group of two in which the other rank does nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(0, 2)
    torch.distributed.destroy_process_group()


def test_it_compiles_without_a_break(second_rank_missing: World) -> None:
    torch._dynamo.reset()
    net = sync_batchnorm(small_net(), second_rank_missing)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(6, 3, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net[1].num_batches_tracked == 1


def test_bf16_without_running_statistics(second_rank_missing: World) -> None:
    net = sync_batchnorm(small_net(), second_rank_missing)
    net[1].track_running_stats = net[4].track_running_stats = False
    with torch.autocast("cpu", torch.bfloat16):
        output = net[:3](torch.randn(6, 3, 5, 5))
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and net[1].weight.grad.dtype == torch.float32
    assert net[1].num_batches_tracked == 0


def test_one_rank_keeps_plain_batch_norm() -> None:
    net = small_net()
    assert type(sync_batchnorm(net, World())[1]) is nn.BatchNorm2d


def test_eval_mode_needs_no_other_rank() -> None:
    net = sync_batchnorm(small_net().eval(), World(0, 2))
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(net(images), small_net().eval()(images))


def large_batch() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = 3 + torch.randn(400, 4, 32, 32, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def run(layer: nn.BatchNorm2d, images: torch.Tensor) -> list[torch.Tensor]:
    """Return output, gradients and running statistics of one training step."""
    images = images.clone().requires_grad_()
    output = F.leaky_relu(layer(images), 0.1, inplace=True)
    (output.square() * output.detach().cos()).sum().backward()
    return [t.detach().double() for t in (output, images.grad, layer.weight.grad, layer.bias.grad, layer.running_mean,
                                          layer.running_var)]


@pytest.mark.parametrize("momentum", [0.001, None])
def test_large_batches_are_added_up_exactly(momentum: float | None) -> None:
    images = large_batch()
    layer = BatchNorm2d(4, eps=1e-3, momentum=momentum)
    wanted = run(nn.BatchNorm2d(4, eps=1e-3, momentum=momentum).double(), images.double())
    found = run(layer, images)
    assert layer.num_batches_tracked == 1
    for name, ours, exact in zip(("output", "input", "weight", "bias", "mean", "variance"), found, wanted, strict=True):
        # The sums of the backward pass are torch's own.
        error = (1e-4 if name in ("input", "weight", "bias") else 1e-6) * exact.norm()
        assert (ours - exact).norm() < error, name


@pytest.mark.parametrize("change", ["eval", "bfloat16", "small", "contiguous"])
def test_otherwise_it_is_torchs_own(change: str) -> None:
    images, ours, theirs = large_batch(), BatchNorm2d(4), nn.BatchNorm2d(4)
    if change == "eval":
        ours, theirs = ours.eval(), theirs.eval()
    images = {"bfloat16": images.bfloat16(), "small": images[:8], "contiguous": images.contiguous()}.get(change, images)
    assert torch.equal(ours(images), theirs(images))
    assert torch.equal(ours.running_var, theirs.running_var)


def test_frozen_parameters_and_input() -> None:
    layer = BatchNorm2d(4)
    layer.weight.requires_grad_(False)
    layer(large_batch()).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
