"""Encoders: the wide residual network of the published runs, and ResNet-34 for large photographs."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import UserError
from shared.cpu.batchnorm import BatchNorm2d
from shared.training.checkpoint import check_finite, read_checkpoint

SLOPE = 0.1  # of the leaky rectifiers


class Block(nn.Module):
    """A pre-activation residual block (Zagoruyko and Komodakis, BMVC 2016): identity + layer.

    first: the block after the first convolution, whose batch norm and activation serve both branches.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, first: bool = False) -> None:
        super().__init__()
        activation = [BatchNorm2d(in_channels), nn.LeakyReLU(SLOPE)]
        self.pre_act = nn.Sequential(*activation) if first else nn.Identity()
        changes = stride > 1 or in_channels != out_channels
        self.identity = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else nn.Identity()
        self.layer = nn.Sequential(
            *([] if first else activation), nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
            BatchNorm2d(out_channels), nn.LeakyReLU(SLOPE),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_act(x)
        return self.identity(x) + self.layer(x)


class WRN(nn.Module):
    """Wide residual network without classifier: float [N, C, H, W] -> features [N, 64 * width].

    depth: 6 n + 4, 28 as published.
    """

    def __init__(self, width: int = 2, in_channels: int = 3, depth: int = 28) -> None:
        super().__init__()
        blocks, channels = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.feature_size = channels[-1]
        self.init_conv = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        units = []
        for number, stride in enumerate((1, 2, 2)):
            first = Block(channels[number], channels[number + 1], stride, first=number == 0)
            rest = (Block(channels[number + 1], channels[number + 1], 1) for _ in range(blocks - 1))
            units.append(nn.Sequential(first, *rest))
        self.unit1, self.unit2, self.unit3 = units
        self.unit4 = nn.Sequential(BatchNorm2d(channels[-1]), nn.LeakyReLU(SLOPE))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit4(self.unit3(self.unit2(self.unit1(self.init_conv(x)))))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ResNet34(nn.Module):
    """torchvision's ResNet-34 without classifier: float [N, 3, H, W] -> features [N, 512].

    weights: a state_dict file of torchvision's network, "" for random weights. UserError for another file.
    """

    feature_size = 512

    def __init__(self, weights: str = "") -> None:
        from torchvision.models import resnet34  # takes as long to import as torch

        super().__init__()
        self.net = resnet34()
        self.net.fc = nn.Identity()
        if weights:
            state = {name: value for name, value in read_checkpoint(weights).items() if not name.startswith("fc.")}
            check_finite(state, f"MODEL.PRETRAINED {weights}")
            try:
                self.net.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(f"MODEL.PRETRAINED {weights}: not the weights of torchvision's resnet34: "
                                f"{' '.join(str(error).split())[:160]}") from None

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.net(x), 1)
