"""A diffusion network cut off behind one block, with a linear head: what fine-tuning trains."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from DDAE.ddae.encoder import Encoder
from shared.training.randomness import torch_rng


class Classifier(nn.Module):
    """(images [N, C, H, W] in [0, 1], standard normal noise of that shape) -> logits [N, classes].

    The encoder's network becomes `body` and is trained; what lies behind the block does not run and stays frozen.
    noisy: whether noise of the level is added, or the image is only scaled as at that level.
    """

    def __init__(self, encoder: Encoder, block: str, level: int, noisy: bool, seed: int) -> None:
        super().__init__()
        self.block, self.level, self.noisy, self.classes = block, level, noisy, encoder.config.classes
        self.body, self.diffusion = encoder.net, encoder.diffusion
        width = encoder.widths[block]
        self.head = nn.Linear(width, self.classes)
        rng, bound = torch_rng(seed, 0, "head"), 1 / math.sqrt(width)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.uniform_(-bound, bound, generator=rng)
        train_what_is_used(self.body, lambda: self.feature(torch.zeros(1, *self.body.image_shape)))

    def feature(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the block's output averaged over pixels: float32 [N, width]."""
        device = next(self.body.parameters()).device
        images = images.to(device)
        noise = torch.zeros_like(images) if noise is None or not self.noisy else noise
        return self.diffusion.features(self.body, images, self.level, noise, [self.block])[self.block]

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.head(self.feature(images, noise))


def train_what_is_used(net: nn.Module, run: Any) -> None:
    """Let those parameters of `net` have gradients that the result of `run()` depends on, and freeze the others."""
    net.requires_grad_(True)
    run().sum().backward()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
