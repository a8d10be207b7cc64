"""U-ViT: a transformer with long skips on latent patches, label and time as tokens (Bao et al. 2023, arXiv 2209.12152),
with the published parameter names, so that published checkpoints load.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from EDM.latent.layers import Attention, Mlp, PatchEmbed, sinusoid, unpatchify
from EDM.training.snapshots import load_weights
from shared.cli import UserError, is_out_of_memory
from shared.training.checkpoint import check_finite, read_checkpoint


class Block(nn.Module):
    """Pre-norm transformer block; with `skip`, tokens are first merged with those of a block before."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, qk_scale: float | None,
                 norm_layer: Any, skip: bool) -> None:
        super().__init__()
        self.norm1 = norm_layer(width)
        self.attn = Attention(width, num_heads, qkv_bias, qk_scale)
        self.norm2 = norm_layer(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Noise prediction: (x [N, C, S, S], timesteps [N], y int64 [N]) -> [N, C, S, S].

    timesteps: 999 t of the continuous schedule, 1..1000 of the discrete one. y: classes; the last of num_classes stands
    for "no class". num_classes <= 0: a network without classes, called without y. use_checkpoint: blocks are computed
    again in the backward pass, for less memory. conv: a 3x3 convolution at the end. skip: whether long skips are used.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768,
                 depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0, qkv_bias: bool = False,
                 qk_scale: float | None = None, norm_layer: Any = nn.LayerNorm, mlp_time_embed: bool = False,
                 num_classes: int = -1, use_checkpoint: bool = False, conv: bool = True, skip: bool = True) -> None:
        super().__init__()
        if embed_dim % num_heads or img_size % patch_size:
            raise UserError(f"no U-ViT of width {embed_dim} with {num_heads} heads for latents of side {img_size} in "
                            f"patches of {patch_size}: heads must divide the width, patches the side")
        self.in_chans, self.num_classes, self.embed_dim = in_chans, num_classes, embed_dim
        self.use_checkpoint, self.extras = use_checkpoint, 2 if num_classes > 0 else 1
        patches = (img_size // patch_size) ** 2
        block = dict(width=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, qk_scale=qk_scale,
                     norm_layer=norm_layer)

        # In the order of the published state.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + patches, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed = nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(),
                                        nn.Linear(4 * embed_dim, embed_dim)) if mlp_time_embed else nn.Identity()
        self.label_emb = nn.Embedding(num_classes, embed_dim) if num_classes > 0 else None
        self.in_blocks = nn.ModuleList(Block(**block, skip=False) for _ in range(depth // 2))
        self.mid_block = Block(**block, skip=False)
        self.out_blocks = nn.ModuleList(Block(**block, skip=skip) for _ in range(depth // 2))
        self.norm = norm_layer(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def none_label(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes - 1

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        return self.with_tokens(x, timesteps, y)[0]

    def with_tokens(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, block: int | None = None
                    ) -> tuple[Tensor, Tensor | None]:
        """Return the prediction, and the patch tokens [N, L, width] behind block number `block` (0: the first)."""
        h = self._embed(x, timesteps, y)
        skips, kept = [], None
        for number, layer in enumerate((*self.in_blocks, self.mid_block, *self.out_blocks)):
            h = self._run(layer, h, skips.pop() if number > len(self.in_blocks) else None)
            if number < len(self.in_blocks):
                skips.append(h)
            if number == block:
                kept = h[:, self.extras:]
        patches = self.decoder_pred(self.norm(h))[:, self.extras:]
        return self.final_layer(unpatchify(patches, self.in_chans)), kept

    def _embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        if (y is None) != (self.label_emb is None):
            raise ValueError("a network with classes needs labels y, one without takes none; label num_classes - 1 "
                             "stands for no class")
        time = sinusoid(timesteps, self.embed_dim).to(self.pos_embed.dtype)
        tokens = [self.time_embed(time)[:, None], self.patch_embed(x)]
        if y is not None:
            tokens.insert(0, self.label_emb(y)[:, None])
        return torch.cat(tokens, dim=1) + self.pos_embed

    def _run(self, layer: Block, h: Tensor, skip: Tensor | None) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(layer, h, skip, use_reentrant=False, preserve_rng_state=False)
        return layer(h, skip)

    def set_full_precision_attention(self, full: bool) -> None:
        """Whether attention computes in fp32 under autocast, as published."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.full_precision = full


def make_uvit(nnet: dict[str, Any], z_shape: tuple[int, ...], seed: int = 0) -> UViT:
    """Return the network of a configuration's section `nnet`, with initial weights; UserError for an unknown one, or
    one for latents of another shape than (C, s, s)."""
    if nnet.get("name", "uvit") != "uvit":
        raise UserError(f"--config.nnet.name={nnet['name']}: the only network is uvit")
    if (nnet["in_chans"], nnet["img_size"]) != tuple(z_shape[:2]):
        raise UserError(f"--config.nnet: in_chans={nnet['in_chans']} and img_size={nnet['img_size']} are not those of "
                        f"latents {tuple(z_shape)}; give --config.nnet.in_chans={z_shape[0]} "
                        f"--config.nnet.img_size={z_shape[1]}")
    torch.manual_seed(seed)
    try:
        return UViT(**{key: value for key, value in nnet.items() if key != "name"})
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"--config.nnet: no U-ViT can be made of it ({error})") from None


def load_uvit(net: UViT, path: str | Path) -> UViT:
    """Load a published checkpoint (a plain state dict) into the network; UserError unless it fits exactly
    and is finite."""
    state = read_checkpoint(path)
    load_weights(net, state, str(path))
    check_finite(state, path)
    return net
