"""The classifiers of MetaSemi: ConvLarge, Shake-Shake ResNet-26 2x96d, and a small one for small images.

Names and shapes of all tensors are those of the published checkpoints.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.distributed import World
from shared.training.randomness import torch_rng

# ---------------------------------------------------------------- random numbers inside networks
# A function of (seed, step): drawn for the global batch; each rank takes its part.

class Noise:
    """A source of uniform numbers in [0, 1): `generator`, or torch's own without one and in compiled networks."""

    def __init__(self, generator: torch.Generator | None = None, world: World | None = None) -> None:
        self.generator, self.world = generator, world or World()

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return float32 numbers of `shape`, images first, on the device of `like`."""
        count = shape[0] * self.world.size
        generator = None if torch.compiler.is_compiling() else self.generator  # which would break the graph
        drawn = torch.rand((count, *shape[1:]), generator=generator, device=like.device)
        return drawn[self.world.slice(count)]


class Noisy(nn.Module):
    """A layer that draws; `set_noise` gives all those of a network one source."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()


class ChannelDropout(Noisy):
    """Zero whole channels of x [N, C, H, W] with probability `p` in training and divide the others by 1 - p.

    Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015; torch's Dropout2d.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = self.noise.uniform((*x.shape[:2], 1, 1), x) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


def set_noise(net: nn.Module, seed: int, step: int, world: World) -> None:
    """Fix the draws of `net` in the passes of `step`, which come in the same order each time.

    Also seeds torch's generators: with the rank for networks without Noisy layers, such as torchvision's with dropout.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, Noisy)]
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + (0 if layers else world.rank) & (1 << 63) - 1)
    if layers:
        noise = Noise(torch_rng(seed, step, "network noise", world.device), world)
        for layer in layers:
            layer.noise = noise


# ---------------------------------------------------------------- ConvLarge

class ConvLarge(nn.Module):
    """The 13-layer network of Laine and Aila (2017) and Tarvainen and Valpola (2017), without their weight norm and
    input noise.

    images [N, input_dim, H, W], H and W at least 12 -> logits [N, num_classes]. stochastic: dropout of whole channels
    (p = 0.5) behind both poolings. top_bn: batch norm on the logits.
    """

    def __init__(self, input_dim: int = 3, num_classes: int = 10, stochastic: bool = True,
                 top_bn: bool = False) -> None:
        super().__init__()
        pooling = [nn.MaxPool2d(2, 2), *([ChannelDropout(0.5)] if stochastic else [])]
        self.block1, self.block2, self.block3 = conv3x3(input_dim, 128), conv3x3(128, 128), conv3x3(128, 128)
        self.maxpool = nn.Sequential(*pooling)
        self.block4, self.block5, self.block6 = conv3x3(128, 256), conv3x3(256, 256), conv3x3(256, 256)
        self.block7 = conv_block(256, 512, 3, 0)
        self.block8, self.block9 = conv_block(512, 256, 1, 0), conv_block(256, 128, 1, 0)
        self.classifier = nn.Sequential(nn.Linear(128, num_classes), *([nn.BatchNorm1d(num_classes)] if top_bn else []))

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the classifier, [N, 128]."""
        x = self.maxpool(self.block3(self.block2(self.block1(x))))
        x = self.maxpool(self.block6(self.block5(self.block4(x))))
        x = self.block9(self.block8(self.block7(x)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def conv_block(in_channels: int, out_channels: int, size: int, padding: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=False),
                         nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.1, inplace=True))


def conv3x3(in_channels: int, out_channels: int) -> nn.Sequential:
    return conv_block(in_channels, out_channels, 3, 1)


class SmallNet(nn.Module):
    """Four convolutions for images of 8x8 and more, such as the handwritten digits; not a published network.

    images [N, input_dim, H, W] -> logits [N, num_classes]; names as in ConvLarge.
    """

    def __init__(self, input_dim: int = 1, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.block1, self.block2 = conv3x3(input_dim, width), conv_block(width, 2 * width, 3, 1, stride=2)
        self.block3, self.block4 = conv3x3(2 * width, 2 * width), conv_block(2 * width, 4 * width, 3, 1, stride=2)
        self.classifier = nn.Sequential(nn.Linear(4 * width, num_classes))

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the classifier, [N, 4 * width]."""
        return F.adaptive_avg_pool2d(self.block4(self.block3(self.block2(self.block1(x)))), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


# ------------------------------------------------------------------------------------------------------ Shake-Shake

class Gate(torch.autograd.Function):
    """forward * a + (1 - forward) * b, whose gradients to a and b are weighted by `backward` in place of `forward`.

    Forward-mode derivatives are those of the forward pass. Gates: [N, 1, 1, 1].
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
        return torch.lerp(b, a, forward_gate.to(a.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate = ctx.saved_tensors[1].to(gradient.dtype)
        of_a = gradient * gate
        return of_a, gradient - of_a, None, None

    @staticmethod
    def jvp(ctx: Any, a: Tensor, b: Tensor, *_: Tensor | None) -> Tensor:
        return torch.lerp(b, a, ctx.saved_tensors[0].to(a.dtype))


def gate(a: Tensor, b: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """Return what `Gate` does, from operations that a compiler takes."""
    mixed = torch.lerp(b, a, backward_gate.to(a.dtype))
    return torch.lerp(b, a, forward_gate.to(a.dtype)).detach() + (mixed - mixed.detach())


class ShakeShakeBlock(Noisy):
    """A residual block with two branches, mixed per image by a random gate (Gastaldi 2017).

    In training the gate is uniform in [0, 1], in evaluation 1/2. The backward pass has a gate of its own, always
    random; with random_eval False it is 1/2 as well where the forward pass was in evaluation mode.
    downsample: the shortcut's module, None for the identity.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
                 random_eval: bool = True) -> None:
        super().__init__()
        self.random_eval = random_eval
        self.conv_a1, self.bn_a1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv_a2, self.bn_a2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv_b1, self.bn_b1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv_b2, self.bn_b2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        start = F.relu(x)
        a = self.bn_a2(self.conv_a2(F.relu(self.bn_a1(self.conv_a1(start)), inplace=True)))
        b = self.bn_b2(self.conv_b2(F.relu(self.bn_b1(self.conv_b1(start)), inplace=True)))
        shortcut = x if self.downsample is None else self.downsample(x)
        mix = gate if torch.compiler.is_compiling() else Gate.apply
        return shortcut + mix(a, b, *self.gates(a))

    def gates(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates [N, 1, 1, 1] of branch a in the forward and in the backward pass."""
        shape = (a.shape[0], 1, 1, 1)
        half = torch.full(shape, 0.5, device=a.device)
        forward = self.noise.uniform(shape, a) if self.training else half
        if not torch.is_grad_enabled() or not (self.training or self.random_eval):
            return forward, half  # without gradients nothing is drawn for them
        return forward, self.noise.uniform(shape, a)


class ShiftConvDownsample(nn.Module):
    """Halve the resolution without losing every other pixel: even ones and odd ones side by side as channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * in_channels, out_channels, 1, groups=2)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x[:, :, 0::2, 0::2], x[:, :, 1::2, 1::2]), 1)
        return self.bn(self.conv(F.relu(x, inplace=True)))


class ResNet32x32(nn.Module):
    """A residual network of three stages for images [N, 3, 32, 32] -> logits [N, num_classes].

    block: called with (inplanes, planes, stride, downsample). layers: blocks in each stage. channels: of the first
    stage; doubled in each further one. downsample: "basic" or "shift_conv", where a stage halves the resolution.
    """

    def __init__(self, block: Any, layers: Sequence[int], channels: int, num_classes: int = 1000,
                 downsample: str = "basic") -> None:
        super().__init__()
        if downsample not in ("basic", "shift_conv") or len(layers) != 3:
            raise ValueError(f"expected three layers and a downsample of basic or shift_conv, got {layers}, "
                             f"{downsample!r}")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = stage(block, 16, channels, layers[0], 1, downsample)
        self.layer2 = stage(block, channels, 2 * channels, layers[1], 2, downsample)
        self.layer3 = stage(block, 2 * channels, 4 * channels, layers[2], 2, downsample)
        self.fc = nn.Linear(4 * channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                outgoing = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / outgoing))

    def features(self, x: Tensor) -> Tensor:
        """Return the input of `fc`, [N, 4 * channels]."""
        return F.avg_pool2d(self.layer3(self.layer2(self.layer1(self.conv1(x)))), 8).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def stage(block: Any, inplanes: int, planes: int, count: int, stride: int, downsample: str) -> nn.Sequential:
    """Return `count` blocks; the first changes channels and resolution."""
    shortcut: nn.Module | None = None
    if stride != 1 and downsample == "shift_conv":
        shortcut = ShiftConvDownsample(inplanes, planes)
    elif stride != 1 or inplanes != planes:
        shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    return nn.Sequential(block(inplanes, planes, stride, shortcut), *(block(planes, planes) for _ in range(count - 1)))


def shakeshake26(num_classes: int, random_eval: bool = True) -> ResNet32x32:
    """Return the Shake-Shake 26 2x96d of Tarvainen and Valpola (2017); random_eval as in ShakeShakeBlock."""
    def block(inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> ShakeShakeBlock:
        return ShakeShakeBlock(inplanes, planes, stride, downsample, random_eval)

    return ResNet32x32(block, (4, 4, 4), 96, num_classes, "shift_conv")
