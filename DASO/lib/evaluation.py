"""Evaluation: predictions in eval mode and the published numbers, overall, a class, and for rare and frequent ones."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.data.batches import ViewedPool
from DASO.lib.losses import log_prior
from DASO.lib.models.semi import SemiModel
from shared.distributed import World, gather

MEDIAN_OF = 20
# The accuracies whose course is kept, by split.
TRACKED = ("top1", "top1_la")


@contextlib.contextmanager
def eval_mode(net: torch.nn.Module) -> Iterator[None]:
    """Put a network into eval mode for the block, then back into the mode it was in."""
    was_training = net.training
    try:
        net.eval()
        yield
    finally:
        net.train(was_training)


@torch.no_grad()
def predict(net: SemiModel, pool: ViewedPool, batch_size: int, world: World) -> Tensor:
    """Return float32 logits [N, K] of all images in order, on the device; every rank computes a part of them."""
    part = -(-len(pool) // world.size)  # the last parts repeat the last image: all ranks gather equal shapes
    indices = np.minimum(np.arange(world.rank * part, (world.rank + 1) * part), len(pool) - 1)
    with eval_mode(net):
        logits = torch.cat([net.evaluate(images) for images in pool.evaluation_batches(indices, batch_size)])
    return gather(logits, world)[:len(pool)]


def accuracy(logits: Tensor, labels: Tensor, top: tuple[int, ...] = (1, 5)) -> list[Tensor]:
    """Return the share in percent of images whose label is among the `top` most probable classes, for each."""
    ranked = logits.topk(min(max(top), logits.shape[1]), dim=1).indices == labels[:, None]
    return [ranked[:, :k].any(1).float().mean() * 100 for k in top]


def class_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy of every class in percent, float64 [K]; NaN for a class without images."""
    right, num_classes = (logits.argmax(1) == labels), logits.shape[1]
    total = torch.bincount(labels, minlength=num_classes).double()
    return 100 * torch.bincount(labels[right], minlength=num_classes).double() / total


def metrics(logits: Tensor, labels: Tensor, prior: Tensor, split: str, classwise: bool = True) -> dict[str, float]:
    """Return the published numbers of a split under their names: `cost` (nats), `top1` and `top5` (percent), the same
    for logits - log(prior) as `*_la`, and per-class accuracies.
    """
    values = {}
    for suffix, prefix, chosen in ("", "", logits), ("_la", "logit_adjusted_", logits - log_prior(prior)):
        top1, top5 = accuracy(chosen, labels)
        values |= {f"{split}/cost{suffix}": F.cross_entropy(chosen, labels).item(),
                   f"{split}/top1{suffix}": top1.item(), f"{split}/top5{suffix}": top5.item()}
        if classwise:
            values |= {f"{split}_classwise/{prefix}{c}": value
                       for c, value in enumerate(class_accuracies(chosen, labels).tolist()) if value == value}
    return values


def extend_history(history: dict[str, list[float]], found: Mapping[str, float], split: str) -> dict[str, float]:
    """Append an evaluation's tracked accuracies and their medians of the last 20; return the medians by name."""
    medians = {}
    for name in TRACKED:
        key = f"{split}/{name}"
        history.setdefault(key, []).append(found[key])
        medians[f"{key}_median20"] = float(np.median(history[key][-MEDIAN_OF:]))
        history.setdefault(f"{key}_median20", []).append(medians[f"{key}_median20"])
    return medians


def summary(courses: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Return for every course of accuracies its last value, the median of the last 20 and the best, side by side.

    courses: name -> values, numbers or lists of numbers (one a class).
    """
    found = {}
    for name, values in courses.items():
        numbers = np.array(values, np.float64)
        found[name] = {"last": numbers[-1].tolist(), "median20": np.median(numbers[-MEDIAN_OF:], axis=0).tolist(),
                       "best": numbers.max(0).tolist()}
    return found


def grouped(accuracies: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean accuracy of each group of classes; groups without a measured class are left out."""
    means = {name: accuracies[classes] for name, classes in groups.items()}
    return {name: float(np.nanmean(part)) for name, part in means.items() if len(part) and not np.isnan(part).all()}
