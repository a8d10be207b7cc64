"""Numbers of a run that are shown now and then: kept on the device, read when a line is written."""
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
        self.sums: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's numbers, tensors [] each; nothing waits for the device."""
        for name, value in values.items():
            self.last[name] = value.detach().float()
            self.sums[name] = self.sums.get(name, 0) + self.last[name]
        self.count += 1

    def read(self, world: World) -> dict[str, tuple[float, float]]:
        """Return name -> (last value, average), means over ranks (a collective)."""
        if not self.count:
            return {}
        both = torch.stack([torch.stack((self.last[name], self.sums[name] / self.count)) for name in self.sums])
        return {name: (last, average) for name, (last, average)
                in zip(self.sums, distributed.mean(both, world).tolist(), strict=True)}

    def reset(self) -> None:
        self.sums, self.last, self.count = {}, {}, 0

    def state_dict(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.reset()
        self.sums, self.count = dict(state["sums"]), int(state["count"])

    def to(self, device: torch.device) -> None:
        """Move what was loaded to the device of the run."""
        self.sums = {name: value.to(device) for name, value in self.sums.items()}


class Best:
    """The best accuracy so far in percent; in a checkpoint a plain number."""

    def __init__(self) -> None:
        self.value = 0.0

    def offer(self, value: float) -> bool:
        """Return whether `value` is better than all before, and keep it then."""
        if value <= self.value:
            return False
        self.value = value
        return True

    def state_dict(self) -> float:
        return self.value

    def load_state_dict(self, value: float) -> None:
        self.value = float(value)


@torch.no_grad()
def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor] | None], world: World,
             say: Callable[[str], None] | None = None, every: int = 100, count: int | None = None
             ) -> tuple[float, float]:
    """Return (accuracy in percent, mean cross-entropy) of `net` in eval mode over all images of all ranks.

    batches: (images, int64 labels), None where another rank has that batch. say: gets the published line of each
    `every`-th batch, of `count`. The network's mode is restored.
    """
    was_training = net.training
    net.eval()
    total = torch.zeros(3, dtype=torch.float64, device=world.device)  # correct, loss, images
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        if batch is None:
            continue
        images, labels = batch
        logits = forward(net, images, None)
        found = torch.stack(((logits.argmax(1) == labels).sum().double(),
                             F.cross_entropy(logits, labels, reduction="sum").double(),
                             torch.full((), len(labels), dtype=torch.float64, device=world.device)))
        total += found
        if say is not None and number % every == 0:
            say(evaluation_line(number, count, time.perf_counter() - started, found.tolist(), total.tolist()))
    net.train(was_training)
    correct, loss, images_seen = distributed.all_sum(total, world).tolist()
    return 100 * correct / images_seen, loss / images_seen


def evaluation_line(number: int, count: int | None, seconds: float, found: Sequence[float],
                    total: Sequence[float]) -> str:
    """Return the log's line for a batch: its own time, loss and accuracy, and those of all batches so far."""
    (correct, loss, images), (all_correct, all_loss, all_images) = found, total
    each = seconds / (number + 1)
    return (f"Test: [{number}/{count}] Time {each:.3f} (avg={each:.3f}) Test Loss {loss / images:.3f} "
            f"(avg={all_loss / all_images:.3f}) Acc {100 * correct / images:.3f} "
            f"(avg={100 * all_correct / all_images:.3f})")
