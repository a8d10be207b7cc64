"""What a learner is: the views it wants, its loss and its state; and the pieces of a loss that most of them share."""
from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shared.lazy import lazy

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch
    from TorchSSL.core.setting import Setting

torch = lazy("torch")


class Algorithm:
    """A semi-supervised learner; one of them is a file with a class of this kind.

    views: what it wants to see of every unlabelled image, in this order: "weak", "medium", "strong", or "rotated" (the
    first strong view by a random number of quarter turns). labeled_views: more views of the labelled images, behind the
    weak one. state: the attributes that are saved, tensors or objects with a state of their own; they must be those of
    the global batch, equal on all ranks. supervised_steps: steps on labels alone before the training, at the initial
    learning rate. rotation_head: whether the network also predicts quarter turns. teacher: the moving average of the
    weights, kept by the trainer; in eval mode and without gradients.
    """

    views: tuple[str, ...] = ()
    labeled_views: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    supervised_steps = 0
    rotation_head = False
    teacher: torch.nn.Module

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        self.options, self.setting = options, setting

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend [] and the numbers to log (tensors on the device)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.state}
        return {name: part if isinstance(part, torch.Tensor) else part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state:
            if isinstance(state[name], torch.Tensor):
                setattr(self, name, state[name].to(self.setting.device))
            else:
                getattr(self, name).load_state_dict(state[name])


def classify(net: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the class logits [n, C] of images, in fp32 at least, whatever the network computes in."""
    logits = net(images)
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def joint_logits(net: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Return logits of the labelled images, of each view, and of further views of labelled images, from one forward
    pass over all of them together.

    Every view then takes part in the batch statistics of every other.
    """
    parts = [batch.labeled, *batch.views, *batch.labeled_views]
    return classify(net, torch.cat(parts)).split([len(part) for part in parts])


@contextlib.contextmanager
def frozen_batchnorm(net: torch.nn.Module) -> Iterator[None]:
    """Train mode for the block, but no running statistic of batch norm moves: the batch's own are used and forgotten.

    They would otherwise follow every forward pass of a step, though only the labelled images are like those to test.
    """
    was_training = net.training
    layers = [layer for layer in net.modules()
              if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.track_running_stats]
    net.train()
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        net.train(was_training)


def ramp_up(step: int, share: float, total: int) -> float:
    """Return the factor on an unsupervised loss: from 0 to 1 over the first `share` of `total` steps, then 1."""
    return min(1.0, step / (share * total)) if share > 0 else 1.0


def squared_difference(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over images and classes of (softmax(logits) - target)^2; both [n, C]."""
    return torch.nn.functional.mse_loss(logits.softmax(1), target)
