"""The U-Net of "Denoising Diffusion Autoencoders are Unified Self-supervised Learners" (arXiv 2303.09769): that of DDPM
(35.7M parameters on CIFAR-10) and, with residual resampling, DDPM++ (56.5M). Its decoder blocks are the features.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from DDAE.ddae.blocks import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    LevelBlock,
    MiddleBlock,
    ResampleBlock,
    ResidualBlock,
    TimeEmbedding,
    Upsample,
)
from shared.cli import UserError, nearest

FINAL_GROUPS = 8


class UNet(nn.Module):
    """x [N, C, H, W] and the network time t [N] or [1] -> [N, C, H, W].

    image_shape: (C, H, W); H and W multiples of 2^(levels - 1). ch_mults: one factor of n_channels per resolution,
    from the highest down. is_attn: whether the blocks of a resolution have attention. attn_channels_per_head: None is
    one head over all channels. n_blocks: residual blocks per resolution on the way down, one more on the way up.
    use_res_for_updown: resample by residual blocks (DDPM++) instead of convolutions. augment_dim: length of the
    augmentation labels, 0 for none. self_condition: name of the decoder block whose pooled output conditions all blocks
    behind it (DDAE++; see `condition`), None for the published network.

    Its decoder blocks are called out_1, out_2, ... in computing order (`block_names`); up-samplers have no name.
    Raises UserError for arguments that do not make a network.
    """

    def __init__(self, image_shape: Sequence[int] = (3, 32, 32), n_channels: int = 128,
                 ch_mults: Sequence[int] = (1, 2, 2, 2), is_attn: Sequence[bool] = (False, True, False, False),
                 attn_channels_per_head: int | None = None, dropout: float = 0.1, n_blocks: int = 2,
                 use_res_for_updown: bool = False, augment_dim: int = 0, self_condition: str | None = None) -> None:
        _check(image_shape, n_channels, ch_mults, is_attn, n_blocks)
        super().__init__()
        self.image_shape, self.n_channels, self.augment_dim = tuple(image_shape), n_channels, augment_dim
        levels, emb_channels, d_k = len(ch_mults), 4 * n_channels, attn_channels_per_head

        def resampler(channels: int, up: bool) -> nn.Module:
            if use_res_for_updown:
                return ResampleBlock(channels, emb_channels, dropout, up=up, down=not up)
            return Upsample(channels) if up else Downsample(channels)

        self.image_proj = nn.Conv2d(image_shape[0], n_channels, 3, padding=1)
        self.time_emb = TimeEmbedding(emb_channels, augment_dim)

        down, skips, channels = [], [n_channels], n_channels
        for level, (mult, attn) in enumerate(zip(ch_mults, is_attn, strict=True)):
            for _ in range(n_blocks):
                down.append(LevelBlock(channels, n_channels * mult, emb_channels, attn, d_k, dropout))
                channels = n_channels * mult
                skips.append(channels)
            if level < levels - 1:
                down.append(resampler(channels, up=False))
                skips.append(channels)
        self.down = nn.ModuleList(down)
        self.middle = MiddleBlock(channels, emb_channels, d_k, dropout)

        up, widths = [], []
        for level in reversed(range(levels)):
            for _ in range(n_blocks + 1):
                width = n_channels * ch_mults[level]
                up.append(LevelBlock(channels + skips.pop(), width, emb_channels, is_attn[level], d_k, dropout))
                channels = width
                widths.append(width)
            if level > 0:
                up.append(resampler(channels, up=True))
        self.up = nn.ModuleList(up)
        self.norm = GroupNorm(FINAL_GROUPS, channels)
        self.final = nn.Conv2d(channels, image_shape[0], 3, padding=1)

        self.widths = {f"out_{number}": width for number, width in enumerate(widths, start=1)}
        self.self_condition = self_condition
        if self_condition is not None:
            self.check_names([self_condition])
            self.condition = SemanticCondition(self.widths[self_condition], emb_channels)

    @property
    def block_names(self) -> list[str]:
        """The decoder blocks, in computing order."""
        return list(self.widths)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise UserError for a block that does not exist, naming those that do."""
        for name in names:
            if name not in self.widths:
                raise UserError(f"this network has no block {name!r}{nearest(str(name), self.widths)}; it has "
                                f"{', '.join(self.widths)}")

    def forward(self, x: torch.Tensor, t: torch.Tensor, aug: torch.Tensor | None = None,
                ret_activation: bool = False) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the output; with `ret_activation` also the outputs of all decoder blocks.

        aug: augmentation labels [N, augment_dim] or None, which is the same as zeros.
        """
        kept: dict[str, torch.Tensor] | None = {} if ret_activation else None
        x = self._decode(x, t, aug, kept, None)
        out = self.final(F.silu(self.norm(x)))
        return (out, kept) if ret_activation else out

    def features(self, x: torch.Tensor, t: torch.Tensor, names: Sequence[str] | None = None,
                 aug: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the outputs [N, C', H', W'] of the decoder blocks `names` (None: all), computing no block behind the
        last of them. Raises UserError for a name that does not exist."""
        names = self.block_names if names is None else list(names)
        self.check_names(names)
        kept: dict[str, torch.Tensor] = {}
        self._decode(x, t, aug, kept, set(names))
        return {name: kept[name] for name in names}

    def _decode(self, x: torch.Tensor, t: torch.Tensor, aug: torch.Tensor | None, kept: dict[str, torch.Tensor] | None,
                wanted: set[str] | None) -> torch.Tensor:
        """Return the input of the head. `kept` receives block outputs: all, or if not None those `wanted`, and then the
        pass ends with the last of them."""
        emb = self.time_emb(t, aug)
        x = self.image_proj(x)
        skips = [x]
        for block in self.down:
            x = block(x, emb)
            skips.append(x)
        x = self.middle(x, emb)
        number, left = 0, len(wanted) if wanted is not None else -1
        for block in self.up:
            if not isinstance(block, LevelBlock):
                x = block(x, emb)
                continue
            number += 1
            name = f"out_{number}"
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
            if kept is not None and (wanted is None or name in wanted):
                kept[name] = x
                left -= 1
                if left == 0:
                    return x
            if name == self.self_condition:
                emb = emb + self.condition(x)
        return x


class SemanticCondition(nn.Module):
    """A decoder block's output [N, channels, H, W] -> what is added to the embedding of the blocks behind, [N, E].

    Self-conditioning of DDAE++ (arXiv 2505.10999): the block's globally pooled feature, which carries most of the
    semantics, is routed around the rest of the decoder. Here: mean over pixels, layer norm, two layers, of which the
    last starts at zero, so that training begins with the published network.
    """

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.lin1 = nn.Linear(channels, emb_channels)
        self.lin2 = nn.Linear(emb_channels, emb_channels)
        nn.init.zeros_(self.lin2.weight)
        nn.init.zeros_(self.lin2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(F.silu(self.lin1(self.norm(x.mean(dim=(2, 3), dtype=torch.float32)))))


def use_channels_last(net: UNet) -> None:
    """Let `net` compute in [N, H, W, C] memory order where that is faster: on GPUs, and on a CPU if it is wide. Numbers
    change by rounding only."""
    if next(net.parameters()).is_cuda or net.n_channels >= 64:
        net.to(memory_format=torch.channels_last)  # images follow the weights of the first convolution


def store_bf16_weights(net: UNet) -> None:
    """Round the weights of convolutions and linear layers to bf16, which autocast would do in every call. For a network
    that is not trained further; under autocast its numbers stay the same."""
    # Where a repetition is fused with a convolution, weights are summed before they are rounded.
    fused = {module.conv1 if isinstance(module, ResidualBlock) else module.conv for module in net.modules()
             if isinstance(module, Upsample) or isinstance(module, ResidualBlock) and module.up}
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in fused:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def attention_heads(net: nn.Module) -> list[tuple[int, int]]:
    """Return (heads, channels per head) of every attention layer, in registration order."""
    return [(module.heads, module.d_k) for module in net.modules() if isinstance(module, AttentionBlock)]


def _check(image_shape: Sequence[int], n_channels: int, ch_mults: Sequence[int], is_attn: Sequence[bool],
           n_blocks: int) -> None:
    if len(image_shape) != 3:
        raise UserError(f"image_shape: expected [channels, height, width], got {list(image_shape)}")
    if not ch_mults or len(is_attn) != len(ch_mults):
        raise UserError(f"is_attn: expected one of true and false for each of the {len(ch_mults)} ch_mults, got "
                        f"{list(is_attn)}")
    if n_channels % 32 or n_channels < 32:
        raise UserError(f"n_channels: expected a multiple of 32, got {n_channels}")
    if n_blocks < 1 or min(ch_mults) < 1:
        raise UserError(f"n_blocks and ch_mults: expected numbers above 0, got {n_blocks} and {list(ch_mults)}")
    factor = 2 ** (len(ch_mults) - 1)
    if image_shape[1] % factor or image_shape[2] % factor:
        raise UserError(f"image_shape: height and width must be multiples of {factor} for {len(ch_mults)} ch_mults, "
                        f"got {image_shape[1]} x {image_shape[2]}")
