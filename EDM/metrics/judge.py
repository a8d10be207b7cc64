"""Classifiers of clean images that judge generated ones: their networks, their training, their features.

An evaluation trains two: the *judge* on real images with clean labels, which then classifies generated images; and the
classifier of the classification accuracy score on generated images, which is tested on real ones (Ravuri and Vinyals,
NeurIPS 2019, arXiv 1905.10887).
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from EDM.metrics.detectors import Detector
from EDM.tdsm.classifiers import CAS_class
from EDM.training.snapshots import digest
from shared.augment.views import WeakPolicy, draw_weak, weak
from shared.cli import UserError
from shared.data.images import ImageSet
from shared.distributed import World
from shared.training.log import Log
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng
from shared.training.run import Run

CHECKPOINT = "checkpoint.pt"
BATCH = 500  # images of a forward pass without gradient


class SmallCNN(torch.nn.Module):
    """Three 3x3 convolutions with batch norm, for images of few pixels; x [N, C, R, R] in [-1, 1] -> logits [N, K]."""

    def __init__(self, img_channels: int, label_dim: int, width: int = 32) -> None:
        super().__init__()
        layers, before = [], img_channels
        for level, after in enumerate((width, 2 * width, 4 * width)):
            layers += [torch.nn.Conv2d(before, after, 3, padding=1, bias=False), torch.nn.BatchNorm2d(after),
                       torch.nn.ReLU()]
            layers += [torch.nn.MaxPool2d(2)] * (level < 2)
            before = after
        self.convolutions = torch.nn.Sequential(*layers)
        self.linear = torch.nn.Linear(4 * width, label_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convolutions(x).mean((2, 3)))


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: SGD with Nesterov momentum and a cosine schedule."""

    steps: int
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4


RECIPES = {"small": Recipe(600, lr=0.05), "cnn": Recipe(4000, lr=0.02), "resnet50": Recipe(40_000),
           "resnet50_pretrained": Recipe(10_000, lr=0.01)}


def default_network(images: ImageSet) -> str:
    """Return the network that fits the images: that of the paper's data sets, a small one below 32 x 32 pixels."""
    if images.size[0] < 32:
        return "small"
    return "cnn" if images.channels == 1 else "resnet50"


def make_network(kind: str, images: ImageSet, weights: str | None = None) -> torch.nn.Module:
    """Return the untrained network `kind`, a key of RECIPES; weights: file of "resnet50_pretrained". UserError."""
    if kind == "small":
        return SmallCNN(images.channels, images.num_classes)
    if kind == "cnn" and images.size[0] % 4:
        raise UserError(f"--classifier=cnn needs images of a side divisible by 4, these have {images.size[0]}; take "
                        "--classifier=small")
    return CAS_class(images.size[0], images.channels, images.num_classes, kind, weights=weights)


def train_classifier(folder: Path, kind: str, images: ImageSet, world: World, *, seed: int, steps: int | None = None,
                     flip: bool = False, weights: str | None = None, overwrite: bool = False, desc: str = "classifier"
                     ) -> torch.nn.Module:
    """Train on the labelled `images` in the run folder, or find it done there; return the network in eval mode.

    steps: None for the network's own number. flip: mirror half of the images; all are shifted by up to an eighth of
    their side. overwrite: move a run with other images or settings aside; otherwise that raises UserError.
    """
    recipe = RECIPES[kind]
    steps = steps or recipe.steps
    torch.manual_seed(int(numpy_rng(seed, 0, "initial weights").integers(1 << 62)))
    net = make_network(kind, images, weights).to(world.device)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=recipe.lr,
                                momentum=recipe.momentum, nesterov=True, weight_decay=recipe.weight_decay)
    config = dict(classifier=kind, steps=steps, seed=seed, flip=flip, images=len(images))
    log = Log(folder, world, every=max(1, min(100, steps // 4)), image_batch=recipe.batch, tensorboard=False, desc=desc)
    run = Run(folder, config, dict(net=net, optimizer=optimizer), world, log=log,
              inputs={"the images": images, "--weights": weights}, checkpoint=CHECKPOINT, overwrite=overwrite,
              ignore=("digest",))  # of the images, in the settings of older versions
    policy = WeakPolicy(flip=flip, pad=max(1, images.size[0] // 8), pad_mode="zero")
    mean = std = (0.5,) * images.channels  # scales to [-1, 1]
    pixels, labels = torch.from_numpy(np.array(images.images)), torch.from_numpy(images.labels)
    pixels, labels = pixels.to(world.device), labels.to(world.device)
    net.train()
    for step in run.steps(steps):
        rng = numpy_rng(seed, step, "classifier batch")
        chosen = to_device(rng.integers(0, len(images), recipe.batch), world.device)
        batch = weak(pixels[chosen], draw_weak(recipe.batch, rng, images.size, policy), mean, std)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(net(batch), labels[chosen])
        loss.backward()
        optimizer.step()
        log.add(loss=loss)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def predict(net: torch.nn.Module, images: ImageSet, device: torch.device) -> np.ndarray:
    """Return the class that the network sees in every image, int64 [N]."""
    found = []
    for start in range(0, len(images), BATCH):
        batch = to_device(np.array(images.images[start:start + BATCH]), device)
        found.append(net(batch.float() / 127.5 - 1).argmax(1).cpu())
    return torch.cat(found).numpy()


def confusion(labels: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Return counts int64 [C, C]: row = label, column = class found."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, found), 1)
    return counts


def as_detector(net: torch.nn.Module, kind: str, images: ImageSet, folder: Path, device: torch.device) -> Detector:
    """Return the judge as a detector: its features are the input of its last layer."""
    last = [module for module in net.modules() if isinstance(module, torch.nn.Linear)][-1]
    seen: list[Tensor] = []
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def network(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(batch.float() / 127.5 - 1)
        return seen.pop().float(), logits

    file = folder / CHECKPOINT
    return Detector("judge", f"judge {kind}", network, images.channels, last.in_features, last.out_features, "none",
                    str(file), digest(file), device)
