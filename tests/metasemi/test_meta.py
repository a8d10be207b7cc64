"""The MetaSemi step: meta-gradients against independent computations, and what it must leave alone."""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from MetaSemi.core.meta import MetaGradient, corrected, divergence, meta_step, pseudo_labels, supervised_step
from MetaSemi.core.model import ConvLarge, ResNet32x32, ShakeShakeBlock, SmallNet, set_noise
from shared.distributed import World
from tests.metasemi import tiny

WORLD = World()
RATE = 0.3


def small_net(seed: int = 0) -> nn.Module:
    """Return a small network whose batch-norm statistics are not the initial ones."""
    torch.manual_seed(seed)
    net = SmallNet(1, 10, width=4)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(32, 1, 8, 8))
        for value in net.parameters():
            value.mul_(1.5)
    return net.train()


def batch(seed: int = 1, count: int = 6, shape: tuple[int, ...] = (1, 8, 8)) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=rng)
    return torch.randn(count, *shape, generator=rng), labels, torch.randn(count, *shape, generator=rng)


def corrected_labels(net: nn.Module, meta: MetaGradient, seed: int = 1):
    return pseudo_labels(net, *batch(seed), RATE, meta, WORLD)


def reference(net: nn.Module, seed: int = 1) -> torch.Tensor:
    """Return 2 J g in float64 by reverse mode twice: the derivative of v -> (v J) g."""
    net = copy.deepcopy(net).double().eval()
    labeled, labels, unlabeled = batch(seed)
    parameters = list(net.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(net(labeled.double()), labels), parameters)
    predicted = net(unlabeled.double()).softmax(1)
    v = torch.zeros_like(predicted, requires_grad=True)
    pulled = torch.autograd.grad(predicted, parameters, v, create_graph=True)
    product = sum((a * b).sum() for a, b in zip(pulled, gradient, strict=True))
    return 2 * torch.autograd.grad(product, v)[0]


@pytest.mark.parametrize("seed", range(3))
def test_exact_meta_gradient(seed: int) -> None:
    net = small_net(seed)
    wanted = reference(net, seed)
    assert wanted.abs().max() > 0.05
    found = corrected_labels(net, MetaGradient(exact=True), seed)
    torch.testing.assert_close(found.meta_grad.double(), wanted, rtol=0, atol=1e-6)
    found = pseudo_labels(net.double(), *(value.double() if value.is_floating_point() else value
                                          for value in batch(seed)), RATE, MetaGradient(exact=True), WORLD)
    torch.testing.assert_close(found.meta_grad, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3])
def test_finite_difference_is_the_published_one(epsilon: float) -> None:
    """Perturbing the parameters themselves, by +e g, -2 e g and +e g, gives the same numbers."""
    net, theirs = small_net(), small_net().double().eval()
    labeled, labels, unlabeled = batch()
    parameters = list(theirs.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(theirs(labeled.double()), labels), parameters)
    step = epsilon / torch.cat([value.flatten() for value in gradient]).norm()
    softmax = []
    with torch.no_grad():
        for factor in (1, -2):
            for value, change in zip(parameters, gradient, strict=True):
                value.add_(factor * step * change)
            softmax.append(theirs(unlabeled.double()).softmax(1))
    wanted = (softmax[0] - softmax[1]) / step
    found = corrected_labels(net, MetaGradient(epsilon))
    assert found.step.item() == pytest.approx(step.item(), rel=1e-5)
    # fp32 rounds the softmax by 1e-7 or so; divided by e, that is this much in G.
    torch.testing.assert_close(found.meta_grad.double(), wanted, rtol=0, atol=2e-7 / step.item())
    assert (found.meta_grad - wanted).norm() / wanted.norm() < 1e-5 * 1e-2 / epsilon
    doubled = (labeled.double(), labels, unlabeled.double())
    found = pseudo_labels(net.double(), *doubled, RATE, MetaGradient(epsilon), WORLD)
    torch.testing.assert_close(found.meta_grad, wanted, rtol=0, atol=1e-11)
    deviation = (wanted - reference(net)).norm() / reference(net).norm()
    assert deviation < 0.02  # the truncation error of the method itself


def test_finite_difference_converges_to_the_exact_one() -> None:
    """In float64 the deviation shrinks with the square of the step: G really is 2 J g."""
    net, deviations = small_net().double(), []
    values = [value.double() if value.is_floating_point() else value for value in batch()]
    for epsilon in (1e-2, 1e-3):
        found = pseudo_labels(net, *values, RATE, MetaGradient(epsilon), WORLD)
        deviations.append((found.meta_grad - reference(net)).norm())
    assert deviations[1] < deviations[0] / 30


def test_exact_meta_gradient_of_attention() -> None:
    """Whose fused kernels have no forward-mode derivative."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    net = nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(64, 10)).double()
    values = [value.double() if value.is_floating_point() else value for value in batch()]
    close, exact = (pseudo_labels(net, *values, RATE, meta, WORLD).meta_grad
                    for meta in (MetaGradient(epsilon=1e-3), MetaGradient(exact=True)))
    assert exact.abs().max() > 0.01 and (close - exact).norm() / exact.norm() < 1e-5
    assert torch.backends.mha.get_fastpath_enabled()


def test_passes_1_to_4_leave_the_network_alone() -> None:
    for exact in (False, True):
        net = small_net()
        before, versions = copy.deepcopy(net.state_dict()), [value._version for value in net.parameters()]
        buffers = [value._version for value in net.buffers()]
        corrected_labels(net, MetaGradient(exact=exact))
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert [value._version for value in net.parameters()] == versions
        assert [value._version for value in net.buffers()] == buffers
        assert all(value.grad is None for value in net.parameters())


def test_meta_gradient_under_autocast() -> None:
    """Also where the caller has an autocast context that remembers cast weights."""
    net = small_net()
    wanted = corrected_labels(net, MetaGradient()).meta_grad.flatten()
    for exact in (False, True):
        meta = MetaGradient(exact=exact, autocast=torch.bfloat16)
        plain = corrected_labels(net, meta).meta_grad.flatten()
        with torch.autocast("cpu", torch.bfloat16):
            net(batch()[2])  # fills the caller's cache
            inside = corrected_labels(net, meta).meta_grad.flatten()
        for found in (plain, inside):
            assert found.dtype == torch.float32
            assert F.cosine_similarity(found, wanted, dim=0) > 0.995
            assert (found - wanted).norm() / wanted.norm() < 0.1


def test_no_gradient_no_correction() -> None:
    net = small_net()
    labeled, _, unlabeled = batch()
    nn.init.zeros_(net.classifier[0].weight)
    with torch.no_grad():
        net.classifier[0].bias[:] = torch.tensor([200.0] + [0.0] * 9)
    labels = torch.zeros(len(labeled), dtype=torch.int64)  # predicted with certainty: the loss is exactly 0
    for exact in (False, True):
        found = pseudo_labels(net, labeled, labels, unlabeled, RATE, MetaGradient(exact=exact), WORLD)
        assert found.norm == 0 and found.step == 0
        assert torch.equal(found.meta_grad, torch.zeros(len(labeled), 10))
        assert torch.equal(found.targets, found.initial)


def test_correction_is_a_distribution() -> None:
    initial = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.1, 0.2, 0.7]])
    change = torch.tensor([[1.0, -0.5, -0.5], [2.0, -1.0, -1.0], [1.0, 2.0, 7.0]])
    found = corrected(initial, change, 0.1)
    torch.testing.assert_close(found[0], torch.tensor([0.4, 0.35, 0.25]))
    torch.testing.assert_close(found[1], torch.tensor([0.7, 0.2, 0.1]))
    assert torch.equal(found[2], torch.zeros(3))  # nothing is left: as published, not uniform
    torch.testing.assert_close(corrected(initial, change, 1.0)[1], torch.tensor([0.0, 1.1, 1.0]) / 2.1)


def test_divergence_is_kl() -> None:
    target = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    assert divergence(target, logits).item() == pytest.approx(wanted.item(), rel=1e-12)
    divergence(target, logits).backward()
    assert logits.grad.isfinite().all()


class HostReads:
    """Counts what would make the host wait for a device: reads by operators, and by methods of tensors."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __enter__(self) -> HostReads:
        note = self.found.append

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.__name__.partition(".")[0] in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"):
                    note(func.__name__)
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu", "__array__"):
                    note(func.__name__)
                return func(*args, **(kwargs or {}))

        self.modes = contextlib.ExitStack()
        self.modes.enter_context(Operators())
        self.modes.enter_context(Methods())
        return self

    def __exit__(self, *error: object) -> None:
        self.modes.close()


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, bool,
                                  float, np.asarray, lambda value: F.one_hot(value.long())])
def test_the_counter_of_host_reads_counts(read: Callable) -> None:
    with HostReads() as reads:
        read(torch.ones(()) + 1)
    assert reads.found


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mix_up", [False, True])
def test_no_host_read_in_a_step(mix_up: bool, exact: bool) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    lam = torch.full((6, 1), 0.3) if mix_up else None
    with HostReads() as reads:
        meta_step(net, optimizer, *batch(), rate=0.1, lam=lam, meta=MetaGradient(exact=exact))
        supervised_step(net, optimizer, *batch(), rate=0.1, lam=lam)
    assert reads.found == []


@pytest.mark.parametrize(("script", "flags"), [("train_meta", ["--mix-up"]), ("train_baseline", [])])
def test_host_reads_of_a_run_do_not_grow_with_its_steps(script: str, flags: list[str], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither batches nor meters nor the notes of the run wait for the device; lines of the log and evaluations do."""
    monkeypatch.chdir(tmp_path)
    # Whether the loss is finite is asked at once on a CPU, which has nothing to wait for, and with the log on a GPU.
    monkeypatch.setattr("shared.training.log.Log._watch", lambda *_: None)
    monkeypatch.setattr("MetaSemi.core.training.keep_freed_memory", lambda: None)

    def reads(steps: int, every: int = 1000) -> int:
        with HostReads() as found:
            tiny.call(script, *flags, f"--total-steps={steps}", f"--print-freq={every}", "--test-freq=1000",
                      f"--save-path=run{steps}-{every}")
        return len(found.found)

    assert 0 < reads(2) == reads(12) < reads(12, 2)


def test_shake_shake_draws_follow_from_seed_and_step() -> None:
    """Two networks with the same noise are the same; also their gradients, whatever else is drawn in between."""
    def gradients(seed: int, step: int, eager: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = ResNet32x32(ShakeShakeBlock, [1, 1, 1], 4, 10, "shift_conv")
        set_noise(net, seed, step, WORLD)
        if eager:
            torch.rand(100)
        found = pseudo_labels(net, *batch(shape=(3, 32, 32)), RATE, MetaGradient(), WORLD)
        net.train()
        net(batch(shape=(3, 32, 32))[0]).sum().backward()
        return [*found.gradient, *(value.grad for value in net.parameters())]

    first = gradients(3, 7, False)
    for draws, same in (((3, 7, True), True), ((3, 8, False), False), ((4, 7, False), False)):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(*draws), strict=True)) == same


def test_shake_shake_gates() -> None:
    torch.manual_seed(0)
    block = ShakeShakeBlock(4, 4)
    x = torch.randn(500, 4, 4, 4)
    forward, backward = block.train().gates(x)
    assert forward.shape == backward.shape == (500, 1, 1, 1) and not torch.equal(forward, backward)
    assert 0 <= forward.min() < 0.02 and 0.98 < forward.max() < 1 and abs(forward.mean() - 0.5) < 0.05
    forward, backward = block.eval().gates(x)
    assert (forward == 0.5).all() and backward.std() > 0.2  # the gradient in evaluation mode is random
    block.random_eval = False
    assert (torch.cat(block.gates(x)) == 0.5).all()


def test_exact_meta_gradient_of_shake_shake_uses_the_forward_gate() -> None:
    """Predictions in evaluation mode have the gate 1/2, so their derivative does too, whatever reverse mode draws."""
    torch.manual_seed(0)
    net = ResNet32x32(ShakeShakeBlock, [1, 1, 1], 4, 10, "shift_conv").double()
    labeled, labels, unlabeled = batch(shape=(3, 32, 32), count=3)
    found = []
    for meta in (MetaGradient(exact=True), MetaGradient(epsilon=1e-4)):
        set_noise(net, 0, 0, WORLD)
        found.append(pseudo_labels(net, labeled.double(), labels, unlabeled.double(), RATE, meta, WORLD).meta_grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-7)


def test_channel_dropout_of_convlarge() -> None:
    torch.manual_seed(0)
    net = ConvLarge().maxpool
    set_noise(net, 0, 0, WORLD)
    out = net(torch.ones(64, 128, 4, 4))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out.amax((2, 3)) == out.amin((2, 3))).all()  # whole channels
    assert abs((out > 0).float().mean() - 0.5) < 0.02
    again = net(torch.ones(64, 128, 4, 4))
    assert not torch.equal(out, again)  # a draw of its own each time it is used
    halves = []
    for rank in range(2):
        set_noise(net, 0, 0, World(rank, 2))
        halves.append(net(torch.ones(32, 128, 4, 4)))
    assert torch.equal(torch.cat(halves), out)
