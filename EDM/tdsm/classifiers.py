"""The published networks of "Label-Noise Robust Diffusion Models" (Na et al., ICLR 2024): classifiers of noisy images,
which estimate p(class | x_t) at every noise level σ, and the classifier of clean images that scores generated ones.

A preconditioned classifier is called as net(x, sigma, class_labels, augment_labels=augment_labels): x [N, C, R, R],
sigma [N] or a scalar, class_labels is ignored, augment_labels [N, augment_dim] or None; it returns float32 logits
[N, label_dim], and the one with a transition matrix returns (logits, T). Class names, constructor arguments and
parameter names are those of the published networks.
"""
from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from EDM.training.layers import FourierEmbedding, Init, Linear, PositionalEmbedding
from EDM.training.networks import constructor_kwargs, edm_coefficients, expect, vp_time
from shared.cli import UserError
from shared.cpu.batchnorm import BatchNorm2d
from shared.training.checkpoint import check_finite, read_checkpoint

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
    """ResNet-18 or -34 for small images; a projection of the embedding [N, emb_channels] is added after each stage."""

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


def convolution(in_channels: int, out_channels: int) -> torch.nn.Sequential:
    """Return a 5x5 convolution, ReLU and a 2x2 maximum: [N, in, R, R] -> [N, out, R/2, R/2]."""
    return torch.nn.Sequential(torch.nn.Conv2d(in_channels, out_channels, 5, padding=2), torch.nn.ReLU(),
                               torch.nn.MaxPool2d(2))


# -------------------------------------------------------------------------------------- with the noise-level embedding

# Arguments of the U-Nets that classifiers accept, as published, and have no use for.
UNUSED = ("channel_mult", "num_blocks", "attn_resolutions", "dropout", "label_dropout", "decoder_type",
          "resample_filter")


class NoisyClassifier(torch.nn.Module):
    """A ConditionalResNet, or for encoder_type "standard" a ConditionalCNN, with the noise mapping of a U-Net.

    embedding_type: positional (DDPM++), fourier (NCSN++) or adm. None: the first that the subclass knows.
    """

    ENCODERS: tuple[str, ...] = tuple(BLOCKS)
    EMBEDDINGS: tuple[str, ...] = ("positional", "fourier")
    CHANNELS = 128

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
                 augment_dim: int = 0, model_channels: int | None = None, channel_mult_emb: int = 4,
                 embedding_type: str | None = None, channel_mult_noise: int = 1, encoder_type: str | None = None,
                 **unused: Any) -> None:
        super().__init__()
        encoder, embedding = encoder_type or self.ENCODERS[0], embedding_type or self.EMBEDDINGS[0]
        expect("encoder_type", encoder, self.ENCODERS)
        expect("embedding_type", embedding, self.EMBEDDINGS)
        for name in unused:
            expect("argument of a classifier", name, UNUSED)
        channels = model_channels or self.CHANNELS
        emb_channels, noise_channels = channels * channel_mult_emb, channels * channel_mult_noise
        init = init_augment = Init("xavier_uniform")
        if embedding == "adm":
            init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
            init_augment = Init("kaiming_uniform", weight=0)
        self.sines_first = embedding != "adm"
        self.map_noise = (FourierEmbedding(noise_channels) if embedding == "fourier"
                          else PositionalEmbedding(noise_channels, endpoint=self.sines_first))
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init_augment) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        self.classifier = (ConditionalCNN(img_resolution, in_channels, label_dim, emb_channels)
                           if encoder == "standard"
                           else ConditionalResNet(encoder, in_channels, label_dim, emb_channels))

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, augment_labels: torch.Tensor | None = None
                ) -> torch.Tensor:
        emb = self.map_noise(noise_labels)
        if self.sines_first:
            emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return self.classifier(x, F.silu(self.map_layer1(F.silu(self.map_layer0(emb)))))


class ClassifierSong(NoisyClassifier):
    """A ConditionalResNet with the noise mapping of DDPM++ or NCSN++."""


class ClassifierSong_MNIST(NoisyClassifier):
    """A ConditionalCNN with the noise mapping of DDPM++ or NCSN++."""

    ENCODERS = ("standard",)


class ClassifierDhariwal(NoisyClassifier):
    """A ConditionalResNet with the noise mapping of ADM."""

    EMBEDDINGS, CHANNELS = ("adm",), 192


NETWORKS = {"ClassifierSong": ClassifierSong, "ClassifierSong_MNIST": ClassifierSong_MNIST,
            "ClassifierDhariwal": ClassifierDhariwal}


# -------------------------------------------------------------------------------------------------- preconditioned

class ClassifierPrecond(torch.nn.Module):
    """c(x; σ) = F(c_in·x; c_noise), with the coefficients of the denoisers. F computes in fp16 if `use_fp16` and on a
    GPU. `init_kwargs`: see `Precond`."""

    def __init__(self, scope: Mapping[str, Any]) -> None:
        super().__init__()
        self.init_kwargs = constructor_kwargs(scope)
        for name in self.init_kwargs:
            if name not in scope["model_kwargs"] and name != "model_type":
                setattr(self, name, scope[name])
        expect("model_type", scope["model_type"], NETWORKS)
        self.model = NETWORKS[scope["model_type"]](self.img_resolution, self.img_channels, self.img_channels,
                                                   self.label_dim, **scope["model_kwargs"])

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_in, c_noise = self.coefficients(sigma)
        half = self.use_fp16 and not force_fp32 and x.is_cuda
        with torch.autocast(x.device.type, torch.float16) if half else contextlib.nullcontext():
            return self.model(c_in * x, c_noise.flatten(), augment_labels).to(torch.float32)


class EDMPrecond_classifier(ClassifierPrecond):
    """EDM: the input is scaled to unit variance, the noise level enters as ln(σ)/4."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0, sigma_max: float = float("inf"), sigma_data: float = 0.5,
                 model_type: str = "ClassifierSong", **model_kwargs: Any) -> None:
        super().__init__(locals())

    def coefficients(self, sigma: torch.Tensor) -> tuple[Any, ...]:
        return edm_coefficients(sigma, self.sigma_data)[2:]


class EDMPrecond_classifier_with_transition_matrix(EDMPrecond_classifier):
    """EDMPrecond_classifier and a learned transition matrix: the parameter `transition_matrix` [K, K] is the raw one,
    and `volmin_transition` of it is returned beside the logits."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.transition_matrix = torch.nn.Parameter(torch.full((self.label_dim,) * 2, INITIAL_TRANSITION))

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(*arguments, **keywords), volmin_transition(self.transition_matrix)


class VPPrecond_classifier(ClassifierPrecond):
    """The variance-preserving SDE: the input is scaled as it is there, the noise level enters as its discrete time."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5,
                 model_type: str = "ClassifierSong", **model_kwargs: Any) -> None:
        super().__init__(locals())

    def coefficients(self, sigma: torch.Tensor) -> tuple[Any, ...]:
        return 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * vp_time(sigma, self.beta_d, self.beta_min)


class VEPrecond_classifier(ClassifierPrecond):
    """The variance-exploding SDE: the input as it is, the noise level enters as ln(σ/2)."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0.02, sigma_max: float = 100, model_type: str = "ClassifierSong",
                 **model_kwargs: Any) -> None:
        super().__init__(locals())

    def coefficients(self, sigma: torch.Tensor) -> tuple[Any, ...]:
        return 1, (0.5 * sigma).log()


CLASSIFIERS = {"EDMPrecond_classifier": EDMPrecond_classifier,
               "EDMPrecond_classifier_with_transition_matrix": EDMPrecond_classifier_with_transition_matrix,
               "VPPrecond_classifier": VPPrecond_classifier, "VEPrecond_classifier": VEPrecond_classifier}


def volmin_transition(raw: torch.Tensor) -> torch.Tensor:
    """Return T [K, K] of the raw matrix: 1 on the diagonal and sigmoid(raw) elsewhere, divided by the sums of its rows
    ("Provably End-to-end Label-noise Learning without Anchor Points", Li et al., ICML 2021)."""
    eye = torch.eye(len(raw), dtype=raw.dtype, device=raw.device)
    return F.normalize(eye + (1 - eye) * raw.sigmoid(), p=1, dim=1)


def class_logits(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the logits in a classifier's output, with or without a transition matrix."""
    return output[0] if isinstance(output, tuple) else output


# ---------------------------------------------------------------------------- classification accuracy score (CAS)

CAS_NETWORKS = ("resnet50", "resnet50_pretrained", "cnn")


class CAS_class(torch.nn.Module):
    """A classifier of clean images: net(x) -> logits float32 [N, label_dim], for x [N, img_channels, R, R] in [-1, 1].

    model_type: "resnet50", ResNet-50 with a 7x7 stride-2 first convolution from img_channels; "resnet50_pretrained",
    the same from the torchvision weights in the file `weights` (a state_dict; 3 channels), with a new last layer; or
    "cnn", the two-convolution network for MNIST (R divisible by 4). Raises UserError for another type and for weights
    that cannot be read.
    """

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, model_type: str = "resnet50",
                 weights: str | None = None) -> None:
        super().__init__()
        # A snapshot of it brings all of its weights along and needs no file.
        self.init_kwargs = {**constructor_kwargs(locals()), "weights": None}
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        expect("model_type", model_type, CAS_NETWORKS)
        if model_type == "cnn":
            self.model = CAS_CNN(img_resolution, img_channels, label_dim)
        else:
            self.model = CAS_ResNet50(img_channels, label_dim)
            if model_type == "resnet50_pretrained" and weights is not None:
                self.model.load_pretrained(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.to(torch.float32)).to(torch.float32)


class CAS_ResNet50(torch.nn.Module):
    """torchvision's ResNet-50 with another number of input channels and of classes, under the name `classifier`."""

    def __init__(self, img_channels: int, label_dim: int) -> None:
        super().__init__()
        from torchvision.models import resnet50  # here, as it takes as long to import as torch

        self.classifier = resnet50(num_classes=label_dim)
        self.classifier.conv1 = torch.nn.Conv2d(img_channels, 64, 7, stride=2, padding=3, bias=False)

    def load_pretrained(self, path: str | os.PathLike) -> None:
        """Copy the ImageNet weights of a torchvision state_dict, all but its last layer. Raises UserError."""
        own, tensors = self.classifier.state_dict(), read_checkpoint(path)
        wanted = [name for name in own if not name.startswith("fc.")]
        unfit = [name for name in wanted if not isinstance(tensors.get(name), torch.Tensor)
                 or tensors[name].shape != own[name].shape]
        if unfit:
            raise UserError(f"{path}: expected the state_dict of torchvision's ResNet-50 for images of "
                            f"{own['conv1.weight'].shape[1]} channel(s); {unfit[0]} is missing or of another shape")
        check_finite({name: tensors[name] for name in wanted}, path)
        self.classifier.load_state_dict({name: tensors[name] for name in wanted}, strict=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x)


class CAS_CNN(torch.nn.Module):
    """Two 5x5 convolutions, each with ReLU and a 2x2 maximum, and a linear layer."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int) -> None:
        super().__init__()
        self.conv1 = convolution(img_channels, 16)
        self.conv2 = convolution(16, 32)
        self.linear = torch.nn.Linear(32 * (img_resolution // 4) ** 2, label_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv2(self.conv1(x)).flatten(1))
