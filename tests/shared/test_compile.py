"""What the trainers compile by default on a GPU: each network is one graph, and a further step needs no other graph."""
from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from DASO.lib.models.wrn import WRN
from DDAE.ddae.model import UNet
from MetaSemi.core.meta import MetaGradient, meta_step
from MetaSemi.core.model import ConvLarge, ResNet32x32, ShakeShakeBlock, gate, set_noise
from shared.distributed import World, sync_batchnorm
from shared.training import precision
from shared.training.precision import autocast, compiles
from shared.training.randomness import set_dropout_keys
from TorchSSL.core.networks import WideResNet

CPU, GPU = torch.device("cpu"), torch.device("cuda")
IMAGES = (4, 3, 16, 16)


@pytest.mark.parametrize(("asked", "device", "strict", "able", "answer"), [
    (None, CPU, False, True, False), (None, GPU, False, True, True), (None, GPU, True, True, False),
    (None, GPU, False, False, False), (True, CPU, False, False, True), (False, GPU, False, True, False)])
def test_compiled_by_default_on_a_gpu_alone(asked: bool | None, device: torch.device, strict: bool, able: bool,
                                            answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "can_compile", lambda: able)
    monkeypatch.setattr(torch, "_dynamo", SimpleNamespace(config=SimpleNamespace(suppress_errors=False)))
    assert compiles(asked, device, strict) == answer
    assert torch._dynamo.config.suppress_errors == (asked is None and answer)


@pytest.fixture
def two_ranks() -> Iterator[World]:
    """A process group of two in which the other rank does nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(0, 2)
    torch.distributed.destroy_process_group()


def compiled(net: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(net, fullgraph=True, backend="eager", dynamic=False)


@pytest.mark.parametrize("net", [WRN(1, 3, 10), WideResNet(10, depth=10, widen_factor=1)], ids=["DASO", "TorchSSL"])
def test_classifiers_over_two_ranks_are_one_graph(net: nn.Module, two_ranks: World) -> None:
    net = sync_batchnorm(net, two_ranks).train()
    compiled(net)(torch.randn(IMAGES)).sum().backward()
    assert next(net.parameters()).grad is not None


def test_ddae_is_one_graph() -> None:
    net = UNet([3, 16, 16], n_channels=32, ch_mults=[1, 2], is_attn=[False, True], n_blocks=1, dropout=0.1,
               augment_dim=9, use_res_for_updown=True).train()
    forward, given = compiled(net), (torch.randn(IMAGES), torch.rand(4), torch.rand(4, 9))
    for step in range(2):  # new masks need no new graph
        set_dropout_keys(net, 0, step, range(4))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            out = forward(*given)
        torch.testing.assert_close(out, net(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convlarge", "shakeshake"])
def test_six_passes_of_metasemi_are_four_graphs(name: str) -> None:
    """Passes 1, 2, 3 and 4, 5 and 6 differ in mode, gradients or precision; all steps are alike."""
    size = 16 if name == "convlarge" else 32
    net = ConvLarge() if name == "convlarge" else ResNet32x32(ShakeShakeBlock, [1, 1, 1], 4, 10, "shift_conv")
    torch.compiler.reset()
    net.compile(backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(2):
        set_noise(net, 0, step, World())
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            result = meta_step(net, optimizer, torch.randn(2, 3, size, size), torch.tensor([3, 7]),
                               torch.randn(2, 3, size, size), rate=0.1, lam=torch.rand(2, 1),
                               meta=MetaGradient(autocast=torch.bfloat16))
        assert result.loss.isfinite()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 4


def test_compiled_noise_follows_from_the_step_and_is_that_of_the_global_batch() -> None:
    net = ConvLarge().maxpool
    draw = compiled(net)

    def numbers(step: int, world: World) -> torch.Tensor:
        set_noise(net, 0, step, world)
        return draw(torch.ones(4 // world.size, 128, 4, 4))

    whole = numbers(0, World())
    assert torch.equal(numbers(0, World()), whole) and not torch.equal(numbers(1, World()), whole)
    assert torch.equal(torch.cat([numbers(0, World(rank, 2)) for rank in range(2)]), whole)


def test_compiled_gate_is_the_published_one() -> None:
    """The gradient has a gate of its own."""
    a, b = (torch.randn(4, 3, 2, 2, requires_grad=True) for _ in range(2))
    forward, backward = torch.rand(2, 4, 1, 1, 1)
    out = gate(a, b, forward, backward)
    torch.testing.assert_close(out, forward * a + (1 - forward) * b)
    given = torch.randn_like(a)
    for found, share in zip(torch.autograd.grad(out, (a, b), given), (backward, 1 - backward), strict=True):
        torch.testing.assert_close(found, given * share)


def test_weights_cast_at_once_give_the_numbers_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a layer is unused or used twice; parameters, their gradients and the other layers stay fp32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 14 * 14, 5), nn.Linear(2, 2))
    weights, images = list(net.parameters()), torch.randn(IMAGES)

    def numbers(dtype: torch.dtype) -> list[torch.Tensor]:
        net.zero_grad(set_to_none=True)
        with autocast(CPU, "bf16", net):
            assert net[1].weight.dtype == torch.float32 and net[0].weight.dtype == dtype
            out = net[:4](images) + net[:4](images.flip(3))
        out.square().sum().backward()
        assert all(a is b for a, b in zip(net.parameters(), weights, strict=True))
        assert all((value.grad is None) == (value.shape[-1] == 2) for value in weights)
        return [out, *(value.grad for value in weights if value.grad is not None)]

    expected = numbers(torch.float32)
    monkeypatch.setattr(precision, "CASTING_DEVICES", ("cpu",))
    assert all(torch.equal(a, b) for a, b in zip(numbers(torch.bfloat16), expected, strict=True))
