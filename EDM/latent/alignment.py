"""Representation alignment (REPA, Yu et al. 2025, arXiv 2410.06940): tokens behind an inner block of the diffusion
model are drawn to the patch tokens that a frozen encoder has of the clean image, which shortens training.
"""
from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from EDM.latent.extraction import batch_of, published_rows, read_image
from EDM.latent.schedules import Schedule, losses
from EDM.latent.uvit import UViT
from shared.cli import UserError
from shared.data.photographs import MEAN, STD, PhotographSet
from shared.parallel import cores
from shared.training.precision import autocast

HIDDEN = 2048  # units of the projector's layers
USUAL_BLOCK = 7  # the eighth, as published


class Aligned(nn.Module):
    """A U-ViT and a projector of its tokens behind a block: (x, timesteps, y) -> (prediction, float [N, L, width])."""

    def __init__(self, net: UViT, width: int, block: int | None = None) -> None:
        super().__init__()
        blocks = 2 * len(net.in_blocks) + 1
        self.net, self.block = net, min(USUAL_BLOCK, len(net.in_blocks)) if block is None else block
        if self.block >= blocks:
            raise UserError(f"--repa_block {self.block}: the network's blocks are 0 to {blocks - 1}")
        self.projector = nn.Sequential(nn.Linear(net.embed_dim, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN),
                                       nn.SiLU(), nn.Linear(HIDDEN, width))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        prediction, tokens = self.net.with_tokens(x, timesteps, y, self.block)
        return prediction, self.projector(tokens)


class Targets:
    """The encoder's patch tokens of the images behind rows of latents.

    encoder: see TorchSSL/encoders/encoder.py. side: of the diffusion model's grid of tokens, to which the encoder's is
    resized. weight: of the alignment in the loss. rows: number of latents.
    """

    def __init__(self, photographs: PhotographSet, encoder: Any, resolution: int, side: int, rows: int,
                 device: torch.device, weight: float = 0.5) -> None:
        self.photographs, self.encoder, self.resolution, self.side = photographs, encoder, resolution, side
        self.weight = weight
        mirror = rows != len(photographs)
        self.images, self.mirrored = published_rows(len(photographs), batch_of(resolution), mirror)
        if rows != len(self.images):
            raise UserError(f"--repa: {rows} latents are not those of {len(photographs)} images in {photographs.root}")
        self.pool = ThreadPoolExecutor(cores())
        self.normalisation = [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)]
        encoder.net.to(device)

    @property
    def width(self) -> int:
        """Number of features of a token."""
        size, device = self.encoder.view.size, self.normalisation[0].device
        return self.encoder.patches(torch.zeros(1, 3, size, size, device=device)).shape[2]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the images of rows, float32 [n, 3, R, R] in [-1, 1]; decoded in threads."""
        files = [self.photographs.files[number] for number in self.images[rows]]
        pixels = np.stack(list(self.pool.map(lambda file: read_image(file, self.resolution), files)))
        mirrored = self.mirrored[rows]
        pixels[mirrored] = pixels[mirrored, :, :, ::-1]
        return pixels

    def of(self, images: Tensor) -> Tensor:
        """Return float32 [n, side^2, width] of images on the device, float32 [n, 3, R, R] in [-1, 1]."""
        mean, std = self.normalisation
        size = self.encoder.view.size
        images = F.interpolate(0.5 * (images + 1), (size, size), mode="bilinear", antialias=True)
        tokens = self.encoder.patches((images - mean) / std)
        grid = tokens.mT.unflatten(2, (math.isqrt(tokens.shape[1]), -1))
        return F.interpolate(grid, (self.side, self.side), mode="bilinear", antialias=True).flatten(2).mT


def aligned_losses(model: nn.Module, schedule: Schedule, x0: Tensor, labels: Tensor | None, times: Tensor,
                   noise: Tensor, targets: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Return the mean loss of latents and that of the alignment, both float32. model: an Aligned, alone or in
    DistributedDataParallel."""
    projected = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        prediction, tokens = model(x, time, labels)
        projected.append(tokens)
        return prediction

    with autocast(x0.device, precision):
        loss = losses(schedule, network, x0, times, noise).mean()
        return loss, alignment_loss(projected[0], targets)


def alignment_loss(projected: Tensor, targets: Tensor) -> Tensor:
    """Return minus the mean cosine of projected tokens and targets, both [n, L, width]."""
    return -F.cosine_similarity(projected.float(), targets, dim=-1).mean()
