"""The vision transformer of MSN (Assran et al., ECCV 2022, arXiv 2204.07141), with the published parameter names."""
from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


class Size(NamedTuple):
    """The architecture of a published name."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int


FAMILIES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
            "huge": (1280, 32, 16)}
PATCHES = {"tiny": (16,), "small": (16, 8, 7), "base": (16, 8, 7, 4), "large": (16, 8, 7), "huge": (16, 8, 7, 10)}
# `deit_base` has patches of 16 pixels, `deit_base_p4` of 4.
SIZES = {f"deit_{family}" + ("" if patch == 16 else f"_p{patch}"): Size(*FAMILIES[family], patch)
         for family, patches in PATCHES.items() for patch in patches}


class VisionTransformer(nn.Module):
    """Images [N, 3, S, S] -> class token [N, D]: pre-norm blocks, learned positions, no dropout.

    img_size: side of the images that the positions are learned for; other sides interpolate them.
    head: a module `fc` that follows the last norm, for pre-training.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, embed_dim: int = 768, depth: int = 12,
                 num_heads: int = 12, mlp_ratio: float = 4, head: nn.Module | None = None) -> None:
        super().__init__()
        self.architecture = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
                                 num_heads=num_heads, mlp_ratio=float(mlp_ratio))
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim=embed_dim, strict_img_size=False)
        layer_norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm)
                                    for _ in range(depth))
        self.norm = layer_norm(embed_dim)
        self.fc = head
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the initial weights; those of the head are PyTorch's."""
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the tokens before the first block: the class token, then the patches row by row, [N, 1 + L, D].

        kept: int64 [K], the patches that are kept, in this order.
        """
        height, width = (side // self.patch_size for side in images.shape[2:])
        positions = self.positions(height, width)
        patches = self.patch_embed(images) + positions[:, 1:]
        if kept is not None:
            patches = patches[:, kept]
        first = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        return torch.cat([first, patches], dim=1)

    def positions(self, height: int, width: int) -> Tensor:
        """Return the positions of a grid of patches, after that of the class token: [1, 1 + height * width, D]."""
        count = self.pos_embed.shape[1] - 1
        side = math.isqrt(count)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (height, width), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], dim=1)

    def tokens(self, images: Tensor, blocks: int = 1, kept: Tensor | None = None) -> list[Tensor]:
        """Return the outputs of the last `blocks` blocks, before the last norm, each [N, 1 + L, D]."""
        x, outputs = self.embed(images, kept), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs[-blocks:]

    def features(self, images: Tensor, blocks: int = 1, kept: Tensor | None = None) -> Tensor:
        """Return the class tokens of the last `blocks` blocks side by side, before the last norm: [N, D * blocks]."""
        return torch.cat([tokens[:, 0] for tokens in self.tokens(images, blocks, kept)], dim=1)

    def class_token(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the class token after the last norm, [N, D]."""
        return self.norm(self.features(images, kept=kept))

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the normalised class token [N, D], or the head's output."""
        x = self.class_token(images, kept)
        return x if self.fc is None else self.fc(x)
