"""One FreeMatch step of WRN-28-2 on 64 + 448 + 448 CIFAR-sized images: the trainer's against the original way.

    python -m tests.bench.freematch_step

Times are in units of tests/bench/unit.py, measured around every step in this process. The original way is eager
fp32 in NCHW, with the unused batch norms computed, activations out of place, the average of the weights as a Python
loop with temporaries and a plain SGD. Exit status 1 where a bar is missed or the first step's numbers differ.
"""
from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World
from shared.training.precision import computes_bf16
from tests.bench.unit import unit
from TorchSSL.core.algorithm import Batch, Setting
from TorchSSL.core.networks import WideResNet
from TorchSSL.core.trainer import Trainer
from TorchSSL.freematch import FreeMatch, parse

LABELED, UNLABELED, CLASSES = 64, 448, 10
BARS = {"fp32": 140.0, "bf16": 50.0}  # in units; the original takes 282


def make_batch(layout: torch.memory_format, device: str = "cpu") -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(LABELED + 2 * UNLABELED, 3, 32, 32, generator=generator).contiguous(memory_format=layout)
    labels = torch.randint(CLASSES, (LABELED,), generator=generator)
    labeled, weak, strong = images.to(device).split([LABELED, UNLABELED, UNLABELED])
    return Batch(labeled, labels.to(device), (weak, strong), torch.arange(UNLABELED, device=device),
                 torch.full((UNLABELED,), -1, device=device))


def original_forward(net: WideResNet, x: Tensor) -> Tensor:
    """The forward pass as published: every batch norm computed, every activation a new tensor."""
    x = net.conv1(x)
    for i in range(1, 4):
        for block in getattr(net, f"block{i}").layer:
            activated = F.leaky_relu(block.bn1(x), 0.1)
            start = activated if block.pre_activate else x
            branch = block.conv2(F.leaky_relu(block.bn2(block.conv1(start)), 0.1))
            x = torch.add(x if block.convShortcut is None else block.convShortcut(start), branch)
    x = F.adaptive_avg_pool2d(F.leaky_relu(net.bn1(x), 0.1), 1)
    return net.fc(x.flatten(1))


def slow_step(net: WideResNet) -> Callable[[], float]:
    """Return a function that does one step the original way and returns its loss."""
    device = next(net.parameters()).device
    batch = make_batch(torch.contiguous_format, device)
    shadow = {name: p.detach().clone() for name, p in net.named_parameters()}
    decayed = [p for name, p in net.named_parameters() if "bn" not in name and "bias" not in name]
    plain = [p for name, p in net.named_parameters() if "bn" in name or "bias" in name]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 5e-4}, {"params": plain}], lr=0.03, momentum=0.9,
                                nesterov=True, foreach=False)
    time_p = torch.tensor(1 / CLASSES, device=device)
    p_model = torch.full((CLASSES,), 1 / CLASSES, device=device)

    def step() -> float:
        nonlocal time_p, p_model
        logits = original_forward(net, torch.cat([batch.labeled, *batch.views]))
        supervised = F.cross_entropy(logits[:LABELED], batch.labels)
        weak, strong = logits[LABELED:].chunk(2)
        confidence, label = weak.detach().softmax(1).max(1)
        time_p = 0.999 * time_p + 0.001 * confidence.mean()
        p_model = 0.999 * p_model + 0.001 * weak.detach().softmax(1).mean(0)
        mask = (confidence >= time_p * (p_model / p_model.max())[label]).float()
        loss = supervised + (F.cross_entropy(strong, label, reduction="none") * mask).mean()
        loss.backward()
        optimizer.step()
        for name, p in net.named_parameters():
            shadow[name] = (0.001 * p.detach() + 0.999 * shadow[name]).clone()
        net.zero_grad()
        return loss.item()
    return step


def fast_step(net: WideResNet, precision: str, device: str = "cpu", compiled: bool = False,
              layout: torch.memory_format = torch.channels_last) -> Callable[[], Tensor]:
    """Return a function that does one step of the trainer and returns its loss, a tensor."""
    options, world = parse(["--compile", str(compiled)]), World(device=torch.device(device))
    net = net.to(device, memory_format=layout)
    algorithm = FreeMatch(options, Setting(CLASSES, 50_000, (1 / CLASSES,) * CLASSES, world))
    trainer, batch = Trainer(net, algorithm, options, world, precision), make_batch(layout, device)
    return lambda: trainer.train_step(batch)["train/total_loss"]


def measure(step: Callable[[], float | Tensor], repeats: int) -> tuple[float, float]:
    """Return the loss of the first step and the median time of the others in units, those measured around each."""
    loss, ratios, before = float(step()), [], unit()
    for _ in range(repeats):
        start = time.perf_counter()
        float(step())
        seconds = time.perf_counter() - start
        after = unit()
        ratios.append(2 * seconds / (before + after))
        before = after
    return loss, sorted(ratios)[repeats // 2]


def main() -> int:
    torch.manual_seed(0)
    net = WideResNet(CLASSES)
    loss, original = measure(slow_step(copy.deepcopy(net)), repeats=2)
    print(f"original: {original:.0f} units, first loss {loss:.6f}", flush=True)
    keep_freed_memory()  # as the trainer does at its start
    failed = False
    for precision, bar in BARS.items():
        if precision == "bf16" and not computes_bf16(torch.device("cpu")):
            print("bf16: left out, this processor emulates it", flush=True)
            continue
        found, units = measure(fast_step(copy.deepcopy(net), precision), repeats=5)
        print(f"{precision}: {units:.0f} units (bar {bar:g}), {original / units:.1f} times as fast as the original, "
              f"first loss {found:.6f}", flush=True)
        failed |= units > bar or (precision == "fp32" and abs(found - loss) > 1e-5 * loss)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
