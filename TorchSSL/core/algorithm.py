"""What a learner is: the views it wants, its loss and its state; and the pieces that most losses share."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from shared.distributed import World
from shared.networks import train_mode


@dataclass
class Batch:
    """One rank's part of a step's batch, on its device.

    labeled: float32 [B, C, H, W], weak views, normalised. labels: int64 [B]. views: float32 [uratio * B, C, H, W] each,
    of the same unlabelled images, in the order of `Algorithm.views`. index: int64 [uratio * B], their positions in the
    unlabelled set. truth: int64, their true labels or -1, for metrics only. turns: int64, quarter turns of the
    "rotated" view. labeled_views: more views of the labelled images, float32 [B, C, H, W] each.
    """

    labeled: Tensor
    labels: Tensor
    views: tuple[Tensor, ...] = ()
    index: Tensor | None = None
    truth: Tensor | None = None
    turns: Tensor | None = None
    labeled_views: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Setting:
    """The data and the ranks of a run; class_fractions: of the labelled images."""

    num_classes: int
    num_unlabeled: int
    class_fractions: tuple[float, ...]
    world: World
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return self.world.device


class Algorithm:
    """A semi-supervised learner; each script holds one.

    views: the views of every unlabelled image, in this order: "weak", "medium", "strong", or "rotated" (the first
    strong view by a random number of quarter turns). labeled_views: more views of the labelled images, after the weak
    one. state: the attributes that are saved, tensors or objects with state_dict and load_state_dict; they describe the
    global batch and are equal on all ranks. supervised_steps: steps on labels alone before the training, at the initial
    learning rate. rotation_head: whether the network also predicts quarter turns. teacher: the moving average of the
    weights, in eval mode and without gradients; the trainer sets it.
    """

    views: tuple[str, ...] = ()
    labeled_views: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    supervised_steps = 0
    rotation_head = False
    teacher: nn.Module

    def __init__(self, options: SimpleNamespace, setting: Setting) -> None:
        self.options, self.setting = options, setting

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend [] and the numbers to log (tensors on the device)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.state}
        return {name: part if isinstance(part, Tensor) else part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state:
            if isinstance(state[name], Tensor):
                setattr(self, name, state[name].to(self.setting.device))
            else:
                getattr(self, name).load_state_dict(state[name])


def classify(net: nn.Module, images: Tensor) -> Tensor:
    """Return the class logits [n, C] of images [n, ...], at least fp32 in every precision of the network."""
    logits = net(images)
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def joint_logits(net: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Return the logits of the labelled images, of each view, and of further views of the labelled images.

    One forward pass computes them, so that all views share their batch statistics.
    """
    parts = [batch.labeled, *batch.views, *batch.labeled_views]
    return classify(net, torch.cat(parts)).split([len(part) for part in parts])


@contextlib.contextmanager
def frozen_batchnorm(net: nn.Module) -> Iterator[None]:
    """Train mode for the block with the batch's own statistics, while the running statistics stay as they are.

    Only the labelled images of a step, which are like the test images, shall move the running statistics.
    """
    was_training = net.training
    layers = [layer for layer in net.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    train_mode(net)
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        train_mode(net) if was_training else net.eval()


def ramp_up(step: int, fraction: float, total: int) -> float:
    """Return the factor on an unsupervised loss: from 0 to 1 over the first `fraction` of `total` steps, then 1."""
    return min(1.0, step / (fraction * total)) if fraction > 0 else 1.0


def squared_difference(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over images and classes of (softmax(logits) - target)^2; both [n, C]."""
    return F.mse_loss(logits.softmax(1), target)
