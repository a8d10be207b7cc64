"""Evaluation: predictions in eval mode and the published numbers, overall, by class, for frequent and rare classes."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.data.batches import ViewedPool
from DASO.lib.losses import log_prior
from DASO.lib.models.semi import SemiModel
from shared.distributed import World, gather

FEW, MANY = 20, 100  # labelled images: a class with more than MANY is many-shot, with fewer than FEW few-shot


@torch.no_grad()
def predict(net: SemiModel, pool: ViewedPool, batch_size: int, world: World) -> Tensor:
    """Return float32 logits [N, K] of all images in order, on the device; every rank computes a part of them."""
    part = -(-len(pool) // world.size)  # the last parts repeat the last image: all ranks gather equal shapes
    indices = np.minimum(np.arange(world.rank * part, (world.rank + 1) * part), len(pool) - 1)
    was_training = net.training
    net.eval()
    try:
        logits = torch.cat([net.evaluate(images) for images in pool.evaluation_batches(indices, batch_size)])
    finally:
        net.train(was_training)
    return gather(logits, world)[:len(pool)]


def accuracy(logits: Tensor, labels: Tensor, top: tuple[int, ...] = (1, 5)) -> list[Tensor]:
    """Return for each of `top` the percentage of images whose label is among the k most probable classes."""
    ranked = logits.topk(min(max(top), logits.shape[1]), dim=1).indices == labels[:, None]
    return [ranked[:, :k].any(1).float().mean() * 100 for k in top]


def class_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy of every class in percent, float64 [K]; NaN for a class without images."""
    right, num_classes = (logits.argmax(1) == labels), logits.shape[1]
    total = torch.bincount(labels, minlength=num_classes).double()
    return 100 * torch.bincount(labels[right], minlength=num_classes).double() / total


def metrics(logits: Tensor, labels: Tensor, prior: Tensor, split: str, classwise: bool = True) -> dict[str, float]:
    """Return the published numbers of a split by name: `cost` (nats), `top1` and `top5` (percent), the same for
    logits - log(prior) as `*_la`, and per-class accuracies.
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


def shots(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the classes [*] of each group, "many", "medium" and "few", by their labelled images [K].

    More than 100, 20 to 100, fewer than 20, as Liu et al. (CVPR 2019) divide ImageNet-LT. If a data set is so small
    that a group is empty, the classes are divided into thirds by frequency.
    """
    groups = {"many": np.flatnonzero(counts > MANY), "medium": np.flatnonzero((counts >= FEW) & (counts <= MANY)),
              "few": np.flatnonzero(counts < FEW)}
    if all(len(group) for group in groups.values()):
        return groups
    thirds = np.array_split(np.argsort(-counts, kind="stable"), 3)
    return dict(zip(groups, (np.sort(third) for third in thirds), strict=True))


def grouped(accuracies: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean accuracy of each group of classes; groups without an evaluated class are left out."""
    means = {name: accuracies[classes] for name, classes in groups.items()}
    return {name: float(np.nanmean(part)) for name, part in means.items() if len(part) and not np.isnan(part).all()}
