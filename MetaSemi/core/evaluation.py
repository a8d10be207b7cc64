"""Numbers of a run: kept on the device and read when a line is written; accuracy and loss on the test images."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from MetaSemi.core.meta import forward
from shared import distributed
from shared.distributed import World


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """Return for each k the percentage [1] of images whose class is among the k most likely ones.

    output: logits [N, C], max(topk) <= C. target: int64 [N].
    """
    found = output.topk(max(topk), dim=1).indices == target[:, None]
    return [found[:, :k].any(1).float().mean(0, keepdim=True) * 100 for k in topk]


class Meters:
    """The last value and the average since `reset` of numbers that each step adds; part of a checkpoint."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's numbers, tensors [] each; nothing waits for the device."""
        for name, value in values.items():
            self.last[name] = value.detach().float()
            before = self.sums.get(name, torch.zeros(()))  # one that was loaded is on the CPU
            self.sums[name] = before.to(value.device) + self.last[name]
        self.count += 1

    def read(self) -> dict[str, tuple[float, float]]:
        """Return name -> (last value, average)."""
        if not self.last:
            return {}
        both = torch.stack([torch.stack((self.last[name], self.sums[name] / self.count)) for name in self.last])
        return {name: (last, average) for name, (last, average) in zip(self.last, both.tolist(), strict=True)}

    def state_dict(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.reset()
        self.sums, self.count = dict(state["sums"]), int(state["count"])


class Best:
    """The best accuracy so far in percent; in a checkpoint a plain number."""

    value = 0.0

    def state_dict(self) -> float:
        return self.value

    def load_state_dict(self, value: float) -> None:
        self.value = float(value)


@torch.no_grad()
def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor] | None], world: World,
             say: Callable[[str], None] | None = None, lines: tuple[str, str] = ("", ""), every: int = 100,
             count: int = 0) -> tuple[float, float, float]:
    """Return (top-1, top-5 in percent, mean cross-entropy) of `net` in eval mode over the images of all ranks.

    batches: (images, int64 labels), None for another rank's; images labelled -1 do not count. say: gets the published
    lines: for every `every`-th batch of `count`, and for the result. The network's mode is restored. Raises
    ZeroDivisionError if no image counts.
    """
    was_training = net.training
    net.eval()
    total = torch.zeros(4, dtype=torch.float64, device=world.device)  # top-1, top-5, loss, images
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        if batch is None:
            continue
        images, labels = batch
        logits = forward(net, images, None)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
        found = torch.stack((hits[:, 0].sum(), hits.sum(), loss, (labels >= 0).sum())).double()
        total += found
        if say is not None and number % every == 0 and found[3]:
            each = (time.perf_counter() - started) / (number + 1)
            (acc1, acc5, loss), (acc1_avg, acc5_avg, loss_avg) = (_means(sums.tolist()) for sums in (found, total))
            say(lines[0].format(number=number, count=count, each=each, acc1=acc1, acc1_avg=acc1_avg, acc5=acc5,
                                acc5_avg=acc5_avg, loss=loss, loss_avg=loss_avg))
    net.train(was_training)
    acc1, acc5, loss = _means(distributed.all_sum(total, world).tolist())
    if say is not None:
        say(lines[1].format(acc1=acc1, acc5=acc5))
    return acc1, acc5, loss


def _means(sums: Sequence[float]) -> tuple[float, float, float]:
    first, fifth, loss, images = sums
    return 100 * first / images, 100 * fifth / images, loss / images
