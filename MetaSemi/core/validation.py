"""The ImageNet validation of both scripts: top-1 and top-5 over all ranks, every image counted once."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from MetaSemi.core.meta import forward
from MetaSemi.core.meters import accuracy
from shared import distributed
from shared.distributed import World


def top5(num_classes: int) -> int:
    """Return 5, or the number of classes where there are fewer."""
    return min(5, num_classes)


@torch.no_grad()
def validate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World, say: Callable[[str], None],
             every: int, count: int) -> tuple[float, float, float]:
    """Return (top-1, top-5 in percent, mean cross-entropy) of `net` in eval mode over the images of all ranks.

    batches: this rank's (images, int64 labels); images labelled -1 do not count. say: gets the published lines, one
    for every `every`-th batch of `count`, and one for the result. The network's mode is restored. Raises
    ZeroDivisionError where no image counts.
    """
    was_training = net.training
    net.eval()
    total = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss, top-1, top-5, images
    for number, (images, labels) in enumerate(batches):
        counted = labels >= 0
        logits, labels = forward(net, images, None)[counted], labels[counted]
        if len(labels):
            first, fifth = accuracy(logits, labels, (1, top5(logits.shape[1])))
            found = torch.cat((F.cross_entropy(logits, labels).view(1), first, fifth)).double()
            total += torch.cat((found, found.new_ones(1))) * len(labels)
            if number % every == 0:
                (loss, acc1, acc5), averages = found.tolist(), (total[:3] / total[3]).tolist()
                say(f"Test: [{number}/{count}] Test Loss {loss:.3f} (avg={averages[0]:.3f}) "
                    f"Acc1 {acc1:.3f} (avg={averages[1]:.3f}) Acc5 {acc5:.3f} (avg={averages[2]:.3f})")
    net.train(was_training)
    loss, acc1, acc5, images_seen = distributed.all_sum(total, world).tolist()
    say(f" * Prec@1 {acc1 / images_seen:.5f} Prec@5 {acc5 / images_seen:.5f}")
    return acc1 / images_seen, acc5 / images_seen, loss / images_seen
