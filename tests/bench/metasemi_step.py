"""One MetaSemi step of ConvLarge, against the same step in the original's order of work. Run it on a quiet machine.

    python -m tests.bench.metasemi_step [batch size]

The original makes its six passes one after another in torch's default memory layout, perturbs the parameters
themselves, tensor by tensor, with a factor that is read back each time, keeps all activations until one backward pass,
and reads every number that it logs. The step here gives the same numbers. Exit status 1 if it is not at least BAR times
as fast, or gives others.
"""
from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from MetaSemi.core.meta import MetaGradient, meta_step
from MetaSemi.core.model import ConvLarge
from shared.cpu.allocator import keep_freed_memory
from tests.bench.unit import unit

BAR = 1.3
TOLERANCE = 1e-5
CLASSES, RATE, WEIGHT, EPSILON = 10, 0.1, 1.0, 1e-2
Step = Callable[[], tuple[Tensor, Tensor]]


def make_batch(count: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 3, 32, 32, generator=rng) for _ in range(2)]
    labels = torch.randint(CLASSES, (count,), generator=rng)
    return images[0], labels, images[1], torch.rand(count, 1, generator=rng)


def plain_batch_norm(net: nn.Module) -> nn.Module:
    """Return a copy with torch's own layers, as the original has them."""
    net = copy.deepcopy(net)
    for block in net.children():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(layer.num_features)
                plain.load_state_dict(layer.state_dict())
                setattr(block, name, plain)
            if isinstance(layer, nn.LeakyReLU):
                setattr(block, name, nn.LeakyReLU(layer.negative_slope))
    return net


def original_step(net: nn.Module, batch: tuple[Tensor, ...]) -> Step:
    """Return a function that does one step in the original's order and returns (loss, meta-gradient)."""
    labeled, labels, unlabeled, lam = batch
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=0.9, weight_decay=1e-4, foreach=False)

    def perturb(gradient: tuple[Tensor, ...], step: Tensor) -> None:
        with torch.no_grad():
            for value, change in zip(parameters, gradient, strict=True):
                value.add_(change, alpha=step.item())

    def step() -> tuple[Tensor, Tensor]:
        net.eval()
        label_logits = net(labeled)
        label_loss = F.cross_entropy(label_logits, labels)
        gradient = torch.autograd.grad(label_loss, parameters)
        size = EPSILON / torch.cat([value.flatten() for value in gradient]).norm()
        with torch.no_grad():
            initial = net(unlabeled).softmax(1)
            perturb(gradient, size)
            up = net(unlabeled).softmax(1)
            perturb(gradient, -2 * size)
            down = net(unlabeled).softmax(1)
            perturb(gradient, size)
            meta_grad = (up - down) / size
            target = (initial - RATE * meta_grad).clamp(min=0)
            target = target / target.sum(1, keepdim=True)
        net.train()
        mixed = lam.view(-1, 1, 1, 1) * labeled + (1 - lam.view(-1, 1, 1, 1)) * unlabeled
        mixed_target = lam * F.one_hot(labels, CLASSES) + (1 - lam) * target
        supervised = F.kl_div(net(mixed).log_softmax(1), mixed_target, reduction="batchmean")
        logits = net(unlabeled)
        consistency = (logits.softmax(1) - target).square().sum(1).mean()
        loss = supervised + WEIGHT * consistency
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for number in (label_loss, consistency, supervised, (label_logits.argmax(1) == labels).float().mean(),
                       logits.softmax(1).max(1).values.mean()):
            number.item()
        return loss.detach(), meta_grad
    return step


def our_step(net: nn.Module, batch: tuple[Tensor, ...], meta: MetaGradient) -> Step:
    net = net.to(memory_format=torch.channels_last)
    labeled, labels, unlabeled, lam = batch
    labeled, unlabeled = (images.contiguous(memory_format=torch.channels_last) for images in (labeled, unlabeled))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> tuple[Tensor, Tensor]:
        result = meta_step(net, optimizer, labeled, labels, unlabeled, rate=RATE, weight=WEIGHT, lam=lam, meta=meta)
        return result.loss, result.pseudo.meta_grad
    return step


def measure(step: Step, repeats: int) -> tuple[Tensor, Tensor, float]:
    """Return (loss, meta-gradient) of the first step and the median time of the others in units."""
    loss, meta_grad = step()
    ratios, before = [], unit()
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        after = unit()
        ratios.append(2 * seconds / (before + after))
        before = after
    return loss, meta_grad, sorted(ratios)[repeats // 2]


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 128  # as published
    torch.manual_seed(0)
    net, batch = ConvLarge(stochastic=False), make_batch(count)
    loss, meta_grad, slow = measure(original_step(plain_batch_norm(net), batch), repeats=3)
    print(f"original's order: {slow:.1f} units, batch {count}, {torch.get_num_threads()} thread(s)", flush=True)
    keep_freed_memory()  # as the scripts do at their start
    failed = False
    for name, meta in {"finite": MetaGradient(EPSILON), "exact": MetaGradient(exact=True)}.items():
        our_loss, ours, units = measure(our_step(copy.deepcopy(net), batch, meta), repeats=3)
        apart = (ours - meta_grad).abs().max().item()
        print(f"{name}: {units:.1f} units, {slow / units:.2f} times as fast (bar {BAR}), losses "
              f"{abs(our_loss - loss):.1e} apart, meta-gradients {apart:.1e}", flush=True)
        if name == "finite":
            failed = units * BAR > slow or apart > TOLERANCE or abs(our_loss - loss) > TOLERANCE
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
