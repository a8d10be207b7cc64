"""Classifiers of the classification accuracy score: trained on generated images, tested on real ones (Ravuri and
Vinyals, NeurIPS 2019), as "Label-Noise Robust Diffusion Models" (Na et al., ICLR 2024) uses them.

They see clean images, so there is neither a noise level nor a preconditioning.
"""
from __future__ import annotations

import os

import torch

from EDM.training.preconditioning import as_called
from shared.cli import UserError, nearest
from shared.training.checkpoint import read_checkpoint


class CAS_class(torch.nn.Module):
    """net(x) -> logits float32 [N, label_dim], for x [N, img_channels, R, R] in [-1, 1].

    model_type: "resnet50", ResNet-50 with a 7x7 stride-2 first convolution from img_channels; "resnet50_pretrained",
    the same from the torchvision weights in the file `weights` (a state_dict; 3 channels), with a new last layer; or
    "cnn", the two-convolution network for MNIST (R divisible by 4). Raises UserError for another type and for weights
    that cannot be read.
    """

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, model_type: str = "resnet50",
                 weights: str | None = None) -> None:
        super().__init__()
        self.init_kwargs = as_called({**locals(), "model_kwargs": {}})
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        if model_type not in CAS_NETWORKS:
            raise UserError(f"model_type: expected one of {', '.join(CAS_NETWORKS)}, got {model_type!r}"
                            f"{nearest(model_type, CAS_NETWORKS)}")
        if model_type == "cnn":
            self.model = CAS_CNN(img_resolution, img_channels, label_dim)
        elif model_type == "resnet50":
            self.model = CAS_ResNet50(img_channels, label_dim)
        else:
            self.model = CAS_ResNet50(img_channels, label_dim)
            if weights is not None:
                self.model.load_pretrained(weights)
        # A snapshot of it brings all of its weights along and needs no file.
        self.init_kwargs["weights"] = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.to(torch.float32)).to(torch.float32)


class CAS_ResNet50(torch.nn.Module):
    """torchvision's ResNet-50 with another number of input channels and of classes, under the name `classifier`."""

    def __init__(self, img_channels: int, label_dim: int) -> None:
        super().__init__()
        from torchvision.models import resnet50

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


def convolution(in_channels: int, out_channels: int) -> torch.nn.Sequential:
    """Return a 5x5 convolution, ReLU and a 2x2 maximum: [N, in, R, R] -> [N, out, R/2, R/2]."""
    return torch.nn.Sequential(torch.nn.Conv2d(in_channels, out_channels, 5, padding=2), torch.nn.ReLU(),
                               torch.nn.MaxPool2d(2))


CAS_NETWORKS = ("resnet50", "resnet50_pretrained", "cnn")
