"""The interface of a learner: its views, its loss and its state; the pieces that most losses share, the masked loss of
pseudo-labels and which predictions are good enough among them."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from shared import distributed
from shared.distributed import World
from shared.networks import train_mode
from shared.training.checkpoint import Stateful

# Kernels of a CPU round differently for batches of different sizes, and an image's place in the batch may matter too.
BLOCK = 64  # images that a network gets at a time, always, where predictions must not depend on such things


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


class Algorithm(Stateful):
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
    supervised_steps = 0
    rotation_head = False
    teacher: nn.Module

    def __init__(self, options: SimpleNamespace, setting: Setting) -> None:
        self.options, self.setting = options, setting

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend [] and the numbers to log (tensors on the device)."""
        raise NotImplementedError


def classify(net: nn.Module, images: Tensor) -> Tensor:
    """Return the class logits [n, C] of images [n, ...], at least fp32 in every precision of the network."""
    logits = net(images)
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def in_blocks(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the logits [n, C] of images [n, ...], which the network gets BLOCK at a time, the last ones padded."""
    found = []
    for block in images.split(BLOCK):
        padding = block.new_zeros(BLOCK - len(block), *block.shape[1:])
        found.append(classify(net, torch.cat((block, padding))))
    return torch.cat(found)[:len(images)]


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


# -------------------------------------------------------------------------------- learning from one's own predictions

def consistency(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the masked cross-entropy of logits [n, C] as a mean over all n, kept or not.

    target: classes int64 [n] or probabilities [n, C]; mask: the weight of every image [n], 0 to leave it out.
    """
    return (mask * F.cross_entropy(logits, target, reduction="none")).mean()


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Return probabilities [n, C] to the power 1 / temperature, normalised again."""
    return normalised(probabilities ** (1 / temperature))


def normalised(weights: Tensor) -> Tensor:
    """Return non-negative weights [n, C] as probabilities; rows of zeros stay zero."""
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-30)


def pseudo_label_metrics(mask: Tensor, label: Tensor, truth: Tensor,
                         thresholds: Tensor | None = None) -> dict[str, Tensor]:
    """Return the log entries of every algorithm with pseudo-labels.

    `train/mask_ratio` is, as published, the fraction rejected; `train/utilisation` the fraction kept;
    `train/pseudo_label_acc` the accuracy of those kept, where the truth is known. mask: weights [n]; label, truth:
    int64 [n], truth -1 where unknown; thresholds: of every class [C].
    """
    known = mask * (truth >= 0)
    values = {"train/mask_ratio": 1 - mask.mean(), "train/utilisation": mask.mean(),
              "train/pseudo_label_acc": (known * (label == truth)).sum() / known.sum().clamp(min=1e-12)}
    if thresholds is not None:
        values |= {"train/threshold_min": thresholds.min(), "train/threshold_mean": thresholds.mean(),
                   "train/threshold_max": thresholds.max()}
    return values


class ClassStatus(Stateful):
    """Curriculum pseudo-labelling: low thresholds for classes that are learned slowly.

    Zhang et al., "FlexMatch", NeurIPS 2021 (arXiv 2110.08263), equations 5 to 9. `label` [images], int64: the last
    confident class of each unlabelled image, -1 for none yet. `beta` [C]: the frequency of each class there, relative
    to the most frequent one; during `warm_up`, images without a class count as one class more.
    """

    state = ("label", "beta")

    def __init__(self, setting: Setting, warm_up: bool = True) -> None:
        self.setting, self.warm_up = setting, warm_up
        self.label = torch.full((setting.num_unlabeled,), -1, dtype=torch.int64, device=setting.device)
        self.beta = torch.zeros(setting.num_classes, device=setting.device)

    def refresh(self) -> None:
        """Count the classes anew. As long as all images have the same class or none, `beta` stays."""
        counts = torch.zeros(self.setting.num_classes + 1, device=self.label.device)
        counts.scatter_add_(0, self.label + 1, torch.ones((), device=self.label.device).expand(self.label.shape))
        largest = counts.max() if self.warm_up else counts[1:].max()
        self.beta = torch.where(counts.max() < len(self.label), counts[1:] / largest.clamp(min=1), self.beta)

    def thresholds(self, cutoff: float) -> Tensor:
        """Return the threshold of every class [C], by the convex mapping beta / (2 - beta)."""
        return cutoff * self.beta / (2 - self.beta)

    def remember(self, index: Tensor, label: Tensor, confident: Tensor) -> None:
        """Store the classes of this rank's confident images; index, label int64 [n], confident bool [n].

        An image drawn twice keeps the later class, on any device.
        """
        index, label, confident = (distributed.gather(part, self.setting.world)
                                   for part in (index, label, confident.long()))
        later = ((index[:, None] == index) & (confident == 1)).triu(1).any(1)
        kept = (confident == 1) & ~later
        extended = torch.cat([self.label, self.label.new_zeros(1)])  # the last place takes the other images
        extended.scatter_(0, torch.where(kept, index, len(self.label)), label)
        self.label = extended[:-1]


class DistributionAlignment(Stateful):
    """Predictions scaled so that their average has the class fractions of the labelled images.

    Berthelot et al., "ReMixMatch", ICLR 2020 (arXiv 1911.09785), section 3.1. `p_model` [C]: moving average of the
    predictions, zeros before the first batch.
    """

    state = ("p_model",)

    def __init__(self, setting: Setting, momentum: float = 0.999) -> None:
        self.setting, self.momentum = setting, momentum
        self.p_target = torch.tensor(setting.class_fractions, device=setting.device)
        self.p_model = torch.zeros(setting.num_classes, device=setting.device)

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Move the average towards this batch of probabilities [n, C] and return them aligned."""
        mean = distributed.mean(probabilities.mean(0), self.setting.world)
        moved = self.momentum * self.p_model + (1 - self.momentum) * mean
        self.p_model = torch.where(self.p_model.sum() > 0, moved, mean)
        return normalised(probabilities * self.p_target / self.p_model.clamp(min=1e-12))
