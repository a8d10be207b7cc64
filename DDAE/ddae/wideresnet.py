"""The noise-conditional wide residual network of Song et al. 2021 (arXiv 2011.13456, appendix I.1).

A WideResNet (arXiv 1605.07146) with group normalisation, which is told the noise level of its input image.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOURIER_HALF = 128      # frequencies; the Fourier vector has twice as many entries
FOURIER_SCALE = 16.0
EMBEDDING = 512
WIDTHS = (16, 32, 64)


class WideResNet(nn.Module):
    """Classifier of noisy images: (x [N, in_channels, H, W], t [N]) -> logits [N, num_classes].

    channel_multiplier: 10 with blocks_per_group 4 is WRN-28-10, 38.9M parameters. t: the time input of the noise
    level (t / T for VP, ln sigma for VE). H and W must be multiples of 4.
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
    """Give every image [C, H, W] mean 0 and deviation 1; nearly constant ones are divided by 1/sqrt(C H W) at least."""
    flat = x.flatten(1)
    deviation = flat.std(1).clamp(min=flat.shape[1] ** -0.5)
    return (x - flat.mean(1)[:, None, None, None]) / deviation[:, None, None, None]


def learning_rate(epoch: int, lr: float, epochs: int, warm_epoch: int) -> float:
    """Return the rate of an epoch (from 0): a linear rise over `warm_epoch` epochs, then a cosine.

    As published, the warm-up overrides a schedule that is computed from its own last value; so the cosine goes on
    from the full rate at the end of the warm-up and lies a little above the plain cosine.
    """
    if epoch < warm_epoch:
        return lr * (epoch + 1) / warm_epoch
    start = math.cos(math.pi * max(0, warm_epoch - 1) / epochs)
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / (1 + start)
