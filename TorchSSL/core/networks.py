"""The classifiers of TorchSSL: WideResNet, WideResNetVar (a fourth stage, for STL-10), ResNet50, and those of timm.

Images enter as normalised floats [N, C, H, W]; logits leave as [N, num_classes]. Names, shapes and initialisation are
those of the published checkpoints. Wide residual networks: Zagoruyko and Komodakis 2016, with pre-activation blocks,
biased convolutions and LeakyReLU. ResNet50: He et al. 2016, with the stride in the 3x3 convolution.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import UserError, nearest
from shared.cpu.batchnorm import BatchNorm2d
from shared.networks import TIMM, TimmNetwork, is_timm
from shared.training.randomness import Dropout

WIDE_BN_EPS = 0.001
WIDE_BN_MOMENTUM = 0.001  # weight of the new batch: slow enough to stand in for an average over the EMA's horizon
LEAKY_SLOPE = 0.1


# ---------------------------------------------------------------- wide residual networks


class WideBlock(nn.Module):
    """Pre-activation residual block, [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride].

    A block of one width has the identity as its shortcut. A change of width needs a 1x1 convolution: of the activated
    input in the first stage (`activate_shortcut`), of the raw input in later stages. There the residual branch starts
    from the raw input too, and `bn1` is skipped: it only exists for the checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activate_shortcut: bool, dropout: float,
                 bn_momentum: float, leaky_slope: float) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels, eps=WIDE_BN_EPS, momentum=bn_momentum)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.bn2 = BatchNorm2d(out_channels, eps=WIDE_BN_EPS, momentum=bn_momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same_width = in_channels == out_channels
        self.convShortcut = None if same_width else nn.Conv2d(in_channels, out_channels, 1, stride=stride)
        self.pre_activate = same_width or activate_shortcut
        self.dropout = Dropout(dropout)
        self.leaky_slope = leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        branch = normalise_and_activate(self.bn1, x, self.leaky_slope) if self.pre_activate else x
        shortcut = x if self.convShortcut is None else self.convShortcut(branch)
        branch = normalise_and_activate(self.bn2, self.conv1(branch), self.leaky_slope)
        return self.conv2(self.dropout(branch)).add_(shortcut)


class WideStage(nn.Module):
    """Wide blocks of one width; the first of them takes the stride and the change of width."""

    def __init__(self, n_blocks: int, in_channels: int, out_channels: int, stride: int, **block_options) -> None:
        super().__init__()
        first = WideBlock(in_channels, out_channels, stride, **block_options)
        others = [WideBlock(out_channels, out_channels, 1, **block_options) for _ in range(n_blocks - 1)]
        self.layer = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-k, k = widen_factor: a stem of 16 channels, then stages of 16k, 32k and 64k (and 128k) channels.

    Args:
        num_classes: number of logits.
        depth: 6 b + 4, with b blocks in every stage.
        widen_factor: k; at 1 the first stage has no shortcut convolution and so no stride.
        first_stride: stride of the first stage, 1 or 2 (2 for STL-10); the other stages have 2.
        dropout: rate in 0..1 between the two convolutions of a block.
        rotation_head: add `rot_classifier`, 4 more logits on the same feature; forward then returns both.
        in_channels: colour channels of the images.
        bn_momentum: weight of the new batch in the running statistics of batch norm.
        leaky_slope: negative slope of LeakyReLU.
        n_stages: 3, or 4 for WideResNetVar.

    Raises:
        UserError: for a depth or width that makes no such network.
    """

    def __init__(self, num_classes: int, depth: int = 28, widen_factor: int = 2, first_stride: int = 1,
                 dropout: float = 0.0, rotation_head: bool = False, in_channels: int = 3,
                 bn_momentum: float = WIDE_BN_MOMENTUM, leaky_slope: float = LEAKY_SLOPE, n_stages: int = 3) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise UserError(f"depth: a wide residual network has 6 b + 4 layers (10, 16, 22, 28, ...), not {depth}")
        if widen_factor < 1 or (widen_factor == 1 and first_stride != 1):
            raise UserError(f"widen_factor: expected 1 or more, and 2 or more with first stride {first_stride}; "
                            f"got {widen_factor}")
        widths = [16] + [16 * widen_factor * 2**i for i in range(n_stages)]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        for i in range(n_stages):
            stage = WideStage((depth - 4) // 6, widths[i], widths[i + 1], stride=first_stride if i == 0 else 2,
                              activate_shortcut=i == 0, dropout=dropout, bn_momentum=bn_momentum,
                              leaky_slope=leaky_slope)
            self.add_module(f"block{i + 1}", stage)
        self.bn1 = BatchNorm2d(widths[-1], eps=WIDE_BN_EPS, momentum=bn_momentum)
        self.fc = nn.Linear(widths[-1], num_classes)
        self.rot_classifier = nn.Linear(widths[-1], 4) if rotation_head else None
        self.n_stages = n_stages
        self.leaky_slope = leaky_slope
        initialise_convolutions(self)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        leave_to_data_parallel(self)

    def feature(self, x: Tensor) -> Tensor:
        """Return the pooled feature [N, 16 k 2^(n_stages - 1)] of images [N, C, H, W]."""
        x = self.conv1(x)
        for i in range(self.n_stages):
            x = getattr(self, f"block{i + 1}")(x)
        return normalise_and_activate(self.bn1, x, self.leaky_slope).mean((2, 3))

    def forward(self, x: Tensor, return_feature: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [N, num_classes]; with return_feature (logits, pooled feature); with a rotation head
        (logits, rotation logits [N, 4])."""
        return outputs(self, self.feature(x), return_feature)


class WideResNetVar(WideResNet):
    """WideResNet with a fourth stage of 128k channels and stride 2, for larger images; same arguments."""

    def __init__(self, num_classes: int, *args, **kwargs) -> None:
        super().__init__(num_classes, *args, **kwargs, n_stages=4)


def normalise_and_activate(bn: nn.Module, x: Tensor, leaky_slope: float) -> Tensor:
    """Return LeakyReLU(bn(x)) of the same shape.

    The activation overwrites the normalised tensor: its gradient follows from its result, and one big tensor less saves
    a good part of a step's memory traffic.
    """
    return F.leaky_relu(bn(x), leaky_slope, inplace=True)


# ---------------------------------------------------------------- ResNet50


class Bottleneck(nn.Module):
    """1x1, 3x3 (takes the stride) and 1x1 convolution with batch norm, [N, in_channels, ...] -> [N, 4 width, ...]."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if in_channels != out_channels or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                                            nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)), inplace=True)
        branch = F.relu(self.bn2(self.conv2(branch)), inplace=True)
        branch = self.bn3(self.conv3(branch))
        return F.relu(branch + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet50(nn.Module):
    """ResNet50 under torchvision's parameter names; batch norm with eps 1e-5 and, unless set, momentum 0.1.

    Arguments as in WideResNet; `bn_momentum` None keeps 0.1.
    """

    def __init__(self, num_classes: int, rotation_head: bool = False, in_channels: int = 3,
                 bn_momentum: float | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for i, (width, n_blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
            first = Bottleneck(channels, width, stride=2 if i else 1)
            channels = 4 * width
            others = [Bottleneck(channels, width, stride=1) for _ in range(n_blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *others))
        self.fc = nn.Linear(channels, num_classes)
        self.rot_classifier = nn.Linear(channels, 4) if rotation_head else None
        initialise_convolutions(self)
        if bn_momentum is not None:
            set_bn_momentum(self, bn_momentum)

    def feature(self, x: Tensor) -> Tensor:
        """Return the pooled feature [N, 2048] of images [N, C, H, W]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

    def forward(self, x: Tensor, return_feature: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """As WideResNet.forward."""
        return outputs(self, self.feature(x), return_feature)


# ---------------------------------------------------------------- shared by both


def outputs(net: WideResNet | ResNet50, feature: Tensor, return_feature: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Return the logits of pooled features [N, D], alone or with the features or the rotation logits."""
    logits = net.fc(feature)
    if return_feature:
        return logits, feature
    return logits if net.rot_classifier is None else (logits, net.rot_classifier(feature))


@torch.no_grad()
def initialise_convolutions(net: nn.Module) -> None:
    """Draw convolution weights from a normal distribution of std sqrt(2 / (out_channels kernel_area)) (He et al. 2015).

    Their biases keep PyTorch's default, uniform in +-1/sqrt(fan_in).
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * math.prod(layer.kernel_size)
            layer.weight.normal_(0, math.sqrt(2 / fan_out))


def set_bn_momentum(net: nn.Module, momentum: float) -> None:
    """Set the weight of the new batch in the running statistics of every batch norm of `net`."""
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = momentum


def unused_parameters(net: nn.Module) -> list[str]:
    """Return the names of parameters without effect: `bn1` of every wide block that starts from its raw input."""
    return [f"{name}.bn1.{parameter}" for name, block in net.named_modules()
            if isinstance(block, WideBlock) and not block.pre_activate for parameter in ("weight", "bias")]


def leave_to_data_parallel(net: nn.Module) -> None:
    """Let DistributedDataParallel ignore the parameters without gradients, in place of a search at every step.

    It may wrap the network itself or the compiled one.
    """
    names = unused_parameters(net)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        net, [prefix + name for prefix in ("", "_orig_mod.") for name in names])


# ---------------------------------------------------------------- networks by name


WIDE = {"WideResNet": WideResNet, "WideResNetVar": WideResNetVar}
NAMES = (*WIDE, "ResNet50")
OPTIONS = ("net", "net_from_name", "depth", "widen_factor", "leaky_slope", "dropout", "bn_momentum")
AS_TRAINED = "; give --net, --depth, --widen_factor, --num_classes and --dataset as in its training"


def build_network(name: str, num_classes: int, *, net_from_name: bool = False, depth: int = 28, widen_factor: int = 2,
                  leaky_slope: float = LEAKY_SLOPE, dropout: float = 0.0, first_stride: int = 1,
                  rotation_head: bool = False, in_channels: int = 3, bn_momentum: float | None = None,
                  size: tuple[int, int] | None = None) -> nn.Module:
    """Return the network `name`, freshly initialised, in train mode on the CPU.

    name: one of NAMES, "timm:NAME", or with `net_from_name` a classification constructor of torchvision.models
    (resnet18, ...). size: (H, W) of the images, for the networks of timm.
    depth, widen_factor, leaky_slope, dropout and first_stride concern the wide networks alone. bn_momentum None keeps
    each network's own value.

    Raises:
        UserError: for an unknown name or variant.
    """
    if net_from_name:
        return build_from_torchvision(name, num_classes, rotation_head, in_channels, bn_momentum)
    if is_timm(name):
        net = TimmNetwork(name.removeprefix(TIMM), num_classes, in_channels, size or (224, 224), rotation_head)
        if bn_momentum is not None:
            set_bn_momentum(net, bn_momentum)
        return net
    if name not in NAMES:
        raise UserError(f'net: unknown network "{name}"{nearest(name, NAMES)}; known: {", ".join(NAMES)}, '
                        "timm:NAME, or a torchvision constructor with net_from_name True")
    if name == "ResNet50":
        return ResNet50(num_classes, rotation_head=rotation_head, in_channels=in_channels, bn_momentum=bn_momentum)
    return WIDE[name](num_classes, depth=depth, widen_factor=widen_factor, first_stride=first_stride, dropout=dropout,
                      rotation_head=rotation_head, in_channels=in_channels, leaky_slope=leaky_slope,
                      bn_momentum=WIDE_BN_MOMENTUM if bn_momentum is None else bn_momentum)


def build_from_torchvision(name: str, num_classes: int, rotation_head: bool, in_channels: int,
                           bn_momentum: float | None) -> nn.Module:
    """Return torchvision's classifier `name` without weights; see build_network."""
    import torchvision  # takes a while to import, and only this branch needs it

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f'net: torchvision has no classifier "{name}"{nearest(name, known)}')
    if rotation_head:
        raise UserError(f'net: the rotation task needs one of {", ".join(NAMES)}, not torchvision\'s "{name}"')
    if in_channels != 3:
        raise UserError(f'net: torchvision\'s "{name}" takes images of 3 channels, the data set has {in_channels}')
    # Two of them would otherwise return auxiliary logits as well.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if bn_momentum is not None:
        set_bn_momentum(net, bn_momentum)
    return net


def first_stride_for(dataset: str) -> int:
    """Return the stride of a wide network's first stage: 2 for the 96x96 images of STL-10, else 1.

    dataset: a name, or a path whose last part counts.
    """
    return 2 if PurePath(dataset).name.lower().startswith("stl") else 1


def make_network(options: Mapping[str, Any], num_classes: int, in_channels: int, rotation_head: bool = False,
                 size: tuple[int, int] | None = None) -> nn.Module:
    """Return the untrained network of the options (keys OPTIONS and `dataset`); UserError.

    size: (H, W) of the images; only networks of timm depend on it.
    """
    others = {name: options[name] for name in OPTIONS if name != "net"}
    return build_network(options["net"], num_classes, first_stride=first_stride_for(options["dataset"]),
                         rotation_head=rotation_head, in_channels=in_channels, size=size, **others)


def trained_options(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options that a checkpoint of ours was trained with; {} for other checkpoints."""
    options = content.get("options")
    return options if isinstance(options, Mapping) else {}


def load_weights(net: nn.Module, state: Mapping[str, Tensor], path: str | PurePath, advice: str = "") -> None:
    """Load the weights of a checkpoint; UserError, naming the first difference, for those of another network."""
    ours = {name: value.shape for name, value in net.state_dict().items()}
    theirs = {name: value.shape for name, value in state.items()}
    if odd := sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)):
        raise UserError(f"{path}: the weights of another network ({odd[0]} is {list(theirs.get(odd[0], ()))} there, "
                        f"{list(ours.get(odd[0], ()))} in {type(net).__name__}){advice}")
    net.load_state_dict(dict(state))


def strip_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the `module.` that data-parallel training puts before every name."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
