"""Noise-conditional classifiers: noisy images, the WideResNet, and the accuracy over noise levels."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from DDAE.ddae.data import TestItems
from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.probe import write_result
from shared import distributed
from shared.cli import Option, Text, UserError
from shared.report.plots import Panel, curves
from shared.training.progress import progress
from shared.training.run import Run

FOURIER_HALF = 128      # frequencies; the Fourier vector has twice as many entries
FOURIER_SCALE = 16.0
EMBEDDING = 512
WIDTHS = (16, 32, 64)
COMPARE = Option("--compare", Text, many=True, metavar="JSON", help="draw the curves of these result.json files, too")


# ---------------------------------------------------------------- noisy images
# Variance preserving (DDPM): sqrt(abar_t) x + sqrt(1 - abar_t) noise, told t / n_T. Variance exploding (EDM): x + sigma
# noise, told ln sigma. Images come in [0, 1] and are scaled to [-1, 1].

def training_view(diffusion: DDPM | EDM, x01: Tensor, drawn: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (noisy images [N, C, H, W], time input [N]) at the levels that `diffusion.draw` gave [N]."""
    x = 2 * x01 - 1
    if diffusion.kind == "DDPM":
        return diffusion.perturb(x, drawn, noise)
    sigma = diffusion.training_sigma(drawn)
    return x + sigma.view(-1, 1, 1, 1) * noise, sigma.log()


def test_view(diffusion: DDPM | EDM, x01: Tensor, level: int, noise: Tensor, **steps: int) -> tuple[Tensor, Tensor]:
    """Return (noisy images, time input [N]) with all images at one of `diffusion.test_levels()`.

    steps: of EDM's schedule, in which its levels are counted (default 18).
    """
    noisy, time = diffusion.perturb(2 * x01 - 1, level, noise, **steps)
    time = time.flatten() if diffusion.kind == "DDPM" else time.flatten().log()
    return noisy, time.expand(len(x01))


test_view.__test__ = False  # no test


# ---------------------------------------------------------------- the network

class WideResNet(nn.Module):
    """The noise-conditional classifier of Song et al. 2021 (arXiv 2011.13456, appendix I.1): (x [N, in_channels, H, W],
    t [N]) -> logits [N, num_classes].

    A WideResNet (arXiv 1605.07146) with group normalisation. channel_multiplier: 10 with blocks_per_group 4 is
    WRN-28-10, 38.9M parameters. t: the time input of the noise level (t / T for VP, ln sigma for VE). H and W must be
    multiples of 4.
    """

    def __init__(self, blocks_per_group: int = 4, channel_multiplier: int = 10, in_channels: int = 3,
                 num_classes: int = 10) -> None:
        super().__init__()
        self.time_emb = FourierFeatures()
        self.time_emb_mlp = nn.Sequential(nn.Linear(2 * FOURIER_HALF, EMBEDDING), nn.SiLU(),
                                          nn.Linear(EMBEDDING, EMBEDDING))
        self.init_conv = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        channels = WIDTHS[0]
        groups = []
        for number, width in enumerate(WIDTHS):
            out = width * channel_multiplier
            groups.append(Group(blocks_per_group, channels, out, stride=1 if number == 0 else 2, first=number == 0))
            channels = out
        self.group1, self.group2, self.group3 = groups
        self.pre_pool_bn = norm_relu(channels)
        self.final_linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time_emb_mlp(self.time_emb(t))
        x = self.init_conv(standardise(x))
        for group in (self.group1, self.group2, self.group3):
            x = group(x, emb)
        return self.final_linear(self.pre_pool_bn(x).mean((2, 3)))


class FourierFeatures(nn.Module):
    """Random Fourier features of the time: t [N] -> [sin | cos] [N, 256]. The frequencies are a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(FOURIER_SCALE * torch.randn(FOURIER_HALF), requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t.float()[:, None] * self.W
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Group(nn.Module):
    """Residual blocks of one width; the first one changes width and resolution."""

    def __init__(self, count: int, channels: int, out: int, stride: int, first: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(channels if k == 0 else out, out, stride if k == 0 else 1, activated_skip=first and k == 0)
            for k in range(count))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, emb)
        return x


class Block(nn.Module):
    """Pre-activation residual block, shifted per channel by the noise embedding.

    activated_skip: the skip is the normalised and activated input (the very first block), else the input itself.
    """

    def __init__(self, channels: int, out: int, stride: int, activated_skip: bool) -> None:
        super().__init__()
        self.out, self.activated_skip = out, activated_skip
        self.init_bn = norm_relu(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn_2 = norm_relu(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, out))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        activated = self.init_bn(x)
        skip = activated if self.activated_skip else x
        h = self.conv1(activated)
        h = h + self.time_emb(emb)[:, :, None, None]
        h = self.conv2(self.bn_2(h))
        if skip.shape[1] != self.out:
            if skip.shape[2] != h.shape[2]:
                skip = F.avg_pool2d(skip, skip.shape[2] // h.shape[2])
            skip = F.pad(skip, (0, 0, 0, 0, 0, self.out - skip.shape[1]))
        return h + skip


def norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(min(channels // 4, 32), channels), nn.ReLU())


def standardise(x: Tensor) -> Tensor:
    """Give every image [C, H, W] mean 0 and standard deviation 1, dividing by 1/sqrt(C H W) at least."""
    flat = x.flatten(1)
    std = flat.std(1).clamp(min=flat.shape[1] ** -0.5)
    return (x - flat.mean(1)[:, None, None, None]) / std[:, None, None, None]


def learning_rate(epoch: int, lr: float, epochs: int, warm_epoch: int) -> float:
    """Return the rate of an epoch (from 0): a linear rise over `warm_epoch` epochs, then a cosine.

    As published, the warm-up overrides a schedule that is computed from its own last value: the cosine goes on from the
    full rate at the end of the warm-up and lies a little above the plain cosine.
    """
    if epoch < warm_epoch:
        return lr * (epoch + 1) / warm_epoch
    start = math.cos(math.pi * max(0, warm_epoch - 1) / epochs)
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / (1 + start)


# ---------------------------------------------------------------- accuracy over noise levels

@torch.no_grad()
def accuracy_by_level(classify: Callable[[Tensor, int, Tensor], Tensor], items: TestItems, levels: Sequence[int]
                      ) -> dict[int, float]:
    """Return level -> fraction of the test items of all ranks that are classified correctly.

    classify: (images [n, C, H, W] in [0, 1], level, noise) -> logits. An image has the same noise at every level.
    """
    world = items.world
    correct = torch.zeros(len(levels), dtype=torch.int64, device=world.device)
    for batch in progress(items, "test", len(items.starts), "batches", shown=world.main):
        noise = items.noise(batch, "test noise 0")
        for place, level in enumerate(levels):
            correct[place] += (classify(batch.images, level, noise).argmax(1) == batch.labels).sum()
    return dict(zip(levels, (distributed.all_sum(correct, world).double() / len(items)).tolist(), strict=True))


def report_by_level(run: Run, name: str, accuracies: Mapping[int, float], compare: Sequence[str]) -> None:
    """Print a line per level; write result.json and curve.png, with the curves of other result.json files beside it.

    The accuracy of the result is the mean over levels.
    """
    for level, accuracy in accuracies.items():
        run.log.print(f"[timestep {level}]: Test acc: {accuracy:.3f}")
    if not run.world.main:
        return
    write_result(run, {"last": sum(accuracies.values()) / len(accuracies)}, name=name, by_level=accuracies)
    lines = {name: (list(accuracies), list(accuracies.values()))}
    for path in compare:
        lines.update(read_curve(path))
    curves({"Noise-conditional classifiers": Panel(lines, "noise level (index)", "test accuracy, %", percent=True)},
           run.outdir / "curve.png")
    run.log.print(f"result.json and curve.png are in {run.outdir}")


def read_curve(path: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return name -> (levels, accuracies) of a result.json of a noise-conditional classifier; UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = content["by_level"]
        return {str(content["name"]): ([int(level) for level in found], [float(a) for a in found.values()])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--compare {path}: not the result.json of a noise-conditional classifier") from None
