"""DINOv2 vision transformers (Oquab et al. 2023, arXiv 2304.07193) with patches of 14 pixels, for images of 224 x 224.

Parameter names are those of the published weights dinov2_vits14, dinov2_vitb14 and dinov2_vitl14, which the network is
built from: their shapes tell its width and depth.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import UserError

SIZE = 224
PATCH = 14
HEAD = 64  # channels of an attention head in every published width
NORM_EPS = 1e-6
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block on tokens [N, T, dim], each branch scaled per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DinoV2(nn.Module):
    """The backbone: normalised images float32 [N, 3, 224, 224] -> class token [N, dim].

    grid: patches along a side of the images it was trained on, which its position embeddings are made for.
    """

    def __init__(self, dim: int, depth: int, grid: int = 37) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # of the training alone
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid ** 2, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def positions(self) -> Tensor:
        """Return the position embeddings [1, 1 + 16 x 16, dim], resampled from the grid of the training."""
        side = SIZE // PATCH
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        # The published code asks for a tenth of a patch more than there are; that shifts where it samples.
        factor = (side + 0.1) / self.grid
        table = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)), 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x)
        tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), 1) + self.positions()
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


def is_dinov2(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of a DINOv2 backbone."""
    return "patch_embed.proj.weight" in state and "blocks.0.ls1.gamma" in state


def build_dinov2(state: Mapping[str, Tensor], source: str) -> DinoV2:
    """Return the network of these weights in eval mode. Raises UserError for another variant of it."""
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5) if "pos_embed" in state else 0
    depth = sum(name.startswith("blocks.") and name.endswith(".ls1.gamma") for name in state)
    net = DinoV2(len(state["blocks.0.ls1.gamma"]), depth, max(grid, 1))
    own = net.state_dict()
    wrong = sorted(name for name in own.keys() | state.keys()
                   if name not in own or name not in state or own[name].shape != state[name].shape)
    if wrong:
        raise UserError(f"{source}: a DINOv2 variant that is not served ({wrong[0]}); expected dinov2_vits14, "
                        "dinov2_vitb14 or dinov2_vitl14, without registers")
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def preprocess(images: Tensor) -> Tensor:
    """Resize uint8 [N, 3, H, W] to normalised float32 [N, 3, 224, 224].

    The resize is the bicubic, antialiased one of Pillow, with which FD-DINOv2 is published: first the width, then the
    height, each rounded to grey levels.
    """
    x = images.float()
    for size in ((x.shape[2], SIZE), (SIZE, SIZE)):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    mean, std = (torch.tensor(v, device=x.device).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return (x / 255 - mean) / std
