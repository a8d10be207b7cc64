"""The network of every learner: an encoder and linear heads on its features."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from DASO.lib.config.config import Config
from DASO.lib.models.wrn import WRN, ResNet34
from shared.cli import UserError
from shared.networks import TIMM, TimmNetwork, is_timm, start_from

WITH_BALANCED_HEAD = ("FixMatchABC", "ACR")  # learners that always have the second classifier


class LinearHead(nn.Module):
    """A linear classifier on features: float [N, D] -> logits [N, K] in fp32 at least."""

    def __init__(self, features: int, outputs: int, name: str = "classifier") -> None:
        super().__init__()
        self.name = name  # of the layer, which published files are read by
        layer = nn.Linear(features, outputs)
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        self.add_module(name, layer)

    def forward(self, features: Tensor) -> Tensor:
        logits = getattr(self, self.name)(features)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class SemiModel(nn.Module):
    """Encoder and `classifier`; with `balanced` also `abc_classifier`, which then is evaluated; with `rotation` also
    `projection` (four quarter turns).

    encoder: with `feature_size`. Names are those of the published checkpoints.
    """

    def __init__(self, encoder: nn.Module, num_classes: int = 10, balanced: bool = False,
                 rotation: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = LinearHead(encoder.feature_size, num_classes)
        if balanced:
            self.abc_classifier = LinearHead(encoder.feature_size, num_classes)
        if rotation:
            self.projection = LinearHead(encoder.feature_size, 4, "projections")
        self.balanced = balanced

    def forward(self, images: Tensor) -> Tensor:
        """Return the class logits [N, K] of normalised images [N, C, H, W]."""
        return self.classifier(self.encoder(images))

    def evaluate(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] that are evaluated."""
        features = self.encoder(images)
        return self.abc_classifier(features) if self.balanced else self.classifier(features)


def build_model(cfg: Config, in_channels: int = 3) -> SemiModel:
    """Return the untrained network of ALGORITHM.NAME, initialised from torch's global generator."""
    name = cfg.ALGORITHM.NAME
    encoder = build_encoder(cfg, in_channels)
    balanced = name in WITH_BALANCED_HEAD or (name == "DASO" and cfg.ALGORITHM.ABC.APPLY)
    return SemiModel(encoder, cfg.MODEL.NUM_CLASSES, balanced, cfg.MODEL.WITH_ROTATION_HEAD)


def build_encoder(cfg: Config, in_channels: int) -> nn.Module:
    """Return the encoder of MODEL.NAME, with the weights of MODEL.PRETRAINED, if given."""
    if is_timm(cfg.MODEL.NAME):
        encoder = TimmNetwork(cfg.MODEL.NAME.removeprefix(TIMM), 0, in_channels, (cfg.DATASET.RESOLUTION,) * 2)
        if cfg.MODEL.PRETRAINED:
            try:
                start_from(encoder, cfg.MODEL.PRETRAINED, (), in_channels)
            except UserError as error:
                raise UserError(str(error).replace("--pretrained", "MODEL.PRETRAINED")) from None
        return encoder
    return ResNet34(cfg.MODEL.PRETRAINED) if cfg.MODEL.NAME == "ResNet34" else WRN(cfg.MODEL.WIDTH, in_channels)
