"""Classifiers of noisy images: logits of c(x_t, σ), an estimate of p(class | x_t), for every noise level σ
("Label-Noise Robust Diffusion Models", Na et al., ICLR 2024).

A preconditioned classifier is called as net(x, sigma, class_labels, augment_labels=augment_labels): x [N, C, R, R],
sigma [N] or a scalar, class_labels is ignored, augment_labels [N, augment_dim] or None; it returns float32 logits
[N, label_dim], and the one with a transition matrix returns (logits, T). Class names, constructor arguments and
parameter names are those of the published networks; arguments of the U-Nets that classifiers have no use for are
accepted. The VP and VE forms follow those of the denoisers.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from EDM.metrics.cas_networks import convolution
from EDM.training.layers import FourierEmbedding, Init, Linear, PositionalEmbedding
from EDM.training.preconditioning import as_called
from shared.cli import UserError, nearest
from shared.training.batchnorm import BatchNorm2d

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet34_64": (3, 4, 6, 3)}
WIDTHS, STRIDES = (64, 128, 256, 512), (1, 2, 2, 2)
INITIAL_TRANSITION = -2.0  # of every entry of the raw matrix


# ---------------------------------------------------------------------------------------------- networks in the image

class BasicBlock(torch.nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut: [N, in, R, R] -> [N, out, R/s, R/s]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels)
        self.shortcut = torch.nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ConditionalResNet(torch.nn.Module):
    """ResNet-18 or -34 for small images; a projection of the embedding [N, emb_channels] is added after each stage.

    The published ones average 4x4 features of 32x32 images, or 8x8 of 64x64 (resnet34_64); any size goes.
    """

    def __init__(self, encoder_type: str, in_channels: int, label_dim: int, emb_channels: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(WIDTHS[0])
        for stage, width in enumerate(WIDTHS, start=1):
            setattr(self, f"dense_{stage}", torch.nn.Linear(emb_channels, width))
        channels = WIDTHS[0]
        stages = zip(WIDTHS, STRIDES, BLOCKS[encoder_type], strict=True)
        for stage, (width, stride, count) in enumerate(stages, start=1):
            blocks = [BasicBlock(channels if i == 0 else width, width, stride if i == 0 else 1) for i in range(count)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(*blocks))
            channels = width
        self.linear = torch.nn.Linear(channels, label_dim)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        x, emb = F.relu(self.bn1(self.conv1(x))), F.silu(emb)
        for layer, dense in ((self.layer1, self.dense_1), (self.layer2, self.dense_2), (self.layer3, self.dense_3),
                             (self.layer4, self.dense_4)):
            x = layer(x)
            x = x + dense(emb)[:, :, None, None].to(x.dtype)
        return self.linear(x.mean((2, 3)))


class ConditionalCNN(torch.nn.Module):
    """Two convolutions, for MNIST; a projection of the embedding is added after each. R is a multiple of 4."""

    def __init__(self, img_resolution: int, in_channels: int, label_dim: int, emb_channels: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, 16)
        self.conv2 = convolution(16, 32)
        self.dense_1 = torch.nn.Linear(emb_channels, 16)
        self.dense_2 = torch.nn.Linear(emb_channels, 32)
        self.linear = torch.nn.Linear(32 * (img_resolution // 4) ** 2, label_dim)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        emb = F.silu(emb)
        for layer, dense in ((self.conv1, self.dense_1), (self.conv2, self.dense_2)):
            x = layer(x)
            x = x + dense(emb)[:, :, None, None].to(x.dtype)
        return self.linear(x.flatten(1))


# -------------------------------------------------------------------------------------- with the noise-level embedding

class ClassifierSong(torch.nn.Module):
    """A ConditionalResNet with the noise mapping of DDPM++ (positional) or NCSN++ (fourier)."""

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
                 augment_dim: int = 0, model_channels: int = 128, channel_mult: Sequence[int] = (1, 2, 2, 2),
                 channel_mult_emb: int = 4, num_blocks: int = 4, attn_resolutions: Sequence[int] = (16,),
                 dropout: float = 0.10, label_dropout: float = 0, embedding_type: str = "positional",
                 channel_mult_noise: int = 1, encoder_type: str = "resnet18", decoder_type: str = "standard",
                 resample_filter: Sequence[float] = (1, 1)) -> None:
        super().__init__()
        _expect("encoder_type", encoder_type, BLOCKS)
        emb_channels = model_channels * channel_mult_emb
        _song_mapping(self, model_channels * channel_mult_noise, emb_channels, augment_dim, embedding_type)
        self.classifier = ConditionalResNet(encoder_type, in_channels, label_dim, emb_channels)

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, augment_labels: torch.Tensor | None = None
                ) -> torch.Tensor:
        return self.classifier(x, _song_embedding(self, noise_labels, augment_labels))


class ClassifierSong_MNIST(torch.nn.Module):
    """A ConditionalCNN with the noise mapping of DDPM++ or NCSN++."""

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
                 augment_dim: int = 0, model_channels: int = 128, channel_mult: Sequence[int] = (1, 2, 2, 2),
                 channel_mult_emb: int = 4, num_blocks: int = 4, attn_resolutions: Sequence[int] = (16,),
                 dropout: float = 0.10, label_dropout: float = 0, embedding_type: str = "positional",
                 channel_mult_noise: int = 1, encoder_type: str = "standard", decoder_type: str = "standard",
                 resample_filter: Sequence[float] = (1, 1)) -> None:
        super().__init__()
        _expect("encoder_type", encoder_type, ("standard",))
        emb_channels = model_channels * channel_mult_emb
        _song_mapping(self, model_channels * channel_mult_noise, emb_channels, augment_dim, embedding_type)
        self.classifier = ConditionalCNN(img_resolution, in_channels, label_dim, emb_channels)

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, augment_labels: torch.Tensor | None = None
                ) -> torch.Tensor:
        return self.classifier(x, _song_embedding(self, noise_labels, augment_labels))


class ClassifierDhariwal(torch.nn.Module):
    """A ConditionalResNet with the noise mapping of ADM."""

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
                 augment_dim: int = 0, model_channels: int = 192, channel_mult: Sequence[int] = (1, 2, 3, 4),
                 channel_mult_emb: int = 4, num_blocks: int = 3, attn_resolutions: Sequence[int] = (32, 16, 8),
                 dropout: float = 0.10, label_dropout: float = 0, encoder_type: str = "resnet18") -> None:
        super().__init__()
        _expect("encoder_type", encoder_type, BLOCKS)
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False,
                                  init=Init("kaiming_uniform", weight=0)) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        self.classifier = ConditionalResNet(encoder_type, in_channels, label_dim, emb_channels)

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, augment_labels: torch.Tensor | None = None
                ) -> torch.Tensor:
        return self.classifier(x, _map(self, self.map_noise(noise_labels), augment_labels))


def _song_mapping(net: torch.nn.Module, noise_channels: int, emb_channels: int, augment_dim: int,
                  embedding_type: str) -> None:
    _expect("embedding_type", embedding_type, ("positional", "fourier"))
    init = Init("xavier_uniform")
    net.map_noise = (PositionalEmbedding(noise_channels, endpoint=True) if embedding_type == "positional"
                     else FourierEmbedding(noise_channels))
    net.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
    net.map_layer0 = Linear(noise_channels, emb_channels, init=init)
    net.map_layer1 = Linear(emb_channels, emb_channels, init=init)


def _song_embedding(net: torch.nn.Module, noise_labels: torch.Tensor, augment_labels: torch.Tensor | None
                    ) -> torch.Tensor:
    emb = net.map_noise(noise_labels)
    return _map(net, emb.unflatten(1, (2, -1)).flip(1).flatten(1), augment_labels)  # sines before cosines


def _map(net: torch.nn.Module, emb: torch.Tensor, augment_labels: torch.Tensor | None) -> torch.Tensor:
    if net.map_augment is not None and augment_labels is not None:
        emb = emb + net.map_augment(augment_labels.to(emb.dtype))
    return F.silu(net.map_layer1(F.silu(net.map_layer0(emb))))


NETWORKS = {"ClassifierSong": ClassifierSong, "ClassifierSong_MNIST": ClassifierSong_MNIST,
            "ClassifierDhariwal": ClassifierDhariwal}


def _expect(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise UserError(f"{name}: expected one of {', '.join(known)}, got {value!r}{nearest(value, known)}")


# -------------------------------------------------------------------------------------------------- preconditioned

class EDMPrecond_classifier(torch.nn.Module):
    """EDM: the input is scaled to unit variance, the noise level enters as ln(σ)/4."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0, sigma_max: float = float("inf"), sigma_data: float = 0.5,
                 model_type: str = "ClassifierSong", **model_kwargs: Any) -> None:
        super().__init__()
        self.init_kwargs = as_called(locals())
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max, self.sigma_data = use_fp16, sigma_min, sigma_max, sigma_data
        self.model = build_classifier(model_type, img_resolution, img_channels, label_dim, model_kwargs)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_in, c_noise = 1 / (self.sigma_data**2 + sigma**2).sqrt(), sigma.log() / 4
        return call_classifier(self, c_in * x, c_noise, augment_labels, force_fp32)


class EDMPrecond_classifier_with_transition_matrix(torch.nn.Module):
    """EDMPrecond_classifier and a learned transition matrix: the parameter `transition_matrix` [K, K] is the raw one,
    and `volmin_transition` of it is returned beside the logits."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0, sigma_max: float = float("inf"), sigma_data: float = 0.5,
                 model_type: str = "ClassifierSong", **model_kwargs: Any) -> None:
        super().__init__()
        self.init_kwargs = as_called(locals())
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max, self.sigma_data = use_fp16, sigma_min, sigma_max, sigma_data
        self.transition_matrix = torch.nn.Parameter(torch.full((label_dim, label_dim), INITIAL_TRANSITION))
        self.model = build_classifier(model_type, img_resolution, img_channels, label_dim, model_kwargs)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor]:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_in, c_noise = 1 / (self.sigma_data**2 + sigma**2).sqrt(), sigma.log() / 4
        logits = call_classifier(self, c_in * x, c_noise, augment_labels, force_fp32)
        return logits, volmin_transition(self.transition_matrix)


class VPPrecond_classifier(torch.nn.Module):
    """The variance-preserving SDE: the input is scaled as it is there, the noise level enters as its discrete time."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5,
                 model_type: str = "ClassifierSong", **model_kwargs: Any) -> None:
        super().__init__()
        self.init_kwargs = as_called(locals())
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.beta_d, self.beta_min, self.M, self.epsilon_t = use_fp16, beta_d, beta_min, M, epsilon_t
        self.model = build_classifier(model_type, img_resolution, img_channels, label_dim, model_kwargs)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        t = ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d
        return call_classifier(self, x / (sigma**2 + 1).sqrt(), (self.M - 1) * t, augment_labels, force_fp32)


class VEPrecond_classifier(torch.nn.Module):
    """The variance-exploding SDE: the input as it is, the noise level enters as ln(σ/2)."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0.02, sigma_max: float = 100, model_type: str = "ClassifierSong",
                 **model_kwargs: Any) -> None:
        super().__init__()
        self.init_kwargs = as_called(locals())
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max = use_fp16, sigma_min, sigma_max
        self.model = build_classifier(model_type, img_resolution, img_channels, label_dim, model_kwargs)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        return call_classifier(self, x, (0.5 * sigma).log(), augment_labels, force_fp32)


CLASSIFIERS = {"EDMPrecond_classifier": EDMPrecond_classifier,
               "EDMPrecond_classifier_with_transition_matrix": EDMPrecond_classifier_with_transition_matrix,
               "VPPrecond_classifier": VPPrecond_classifier, "VEPrecond_classifier": VEPrecond_classifier}


def build_classifier(model_type: str, img_resolution: int, img_channels: int, label_dim: int,
                     model_kwargs: Mapping[str, Any]) -> torch.nn.Module:
    """Return the network of a preconditioned classifier. UserError for a model_type that is not a key of NETWORKS."""
    _expect("model_type", model_type, NETWORKS)
    return NETWORKS[model_type](img_resolution=img_resolution, in_channels=img_channels, out_channels=img_channels,
                                label_dim=label_dim, **model_kwargs)


def call_classifier(net: torch.nn.Module, scaled: torch.Tensor, c_noise: torch.Tensor,
                    augment_labels: torch.Tensor | None, force_fp32: bool) -> torch.Tensor:
    """Return the float32 logits of `net.model`, computed in fp16 if the classifier was built so and runs on a GPU."""
    half = net.use_fp16 and not force_fp32 and scaled.device.type == "cuda"
    with torch.autocast(scaled.device.type, torch.float16) if half else contextlib.nullcontext():
        return net.model(scaled, c_noise.flatten(), augment_labels).to(torch.float32)


def volmin_transition(raw: torch.Tensor) -> torch.Tensor:
    """Return T [K, K] of the raw matrix: 1 on the diagonal and sigmoid(raw) elsewhere, divided by the sums of its rows
    ("Provably End-to-end Label-noise Learning without Anchor Points", Li et al., ICML 2021)."""
    eye = torch.eye(len(raw), dtype=raw.dtype, device=raw.device)
    return F.normalize(eye + (1 - eye) * raw.sigmoid(), p=1, dim=1)


def class_logits(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the logits of what a classifier returned, with or without a transition matrix."""
    return output[0] if isinstance(output, tuple) else output
