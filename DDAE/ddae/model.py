"""The U-Net of "Denoising Diffusion Autoencoders are Unified Self-supervised Learners" (arXiv 2303.09769): that of DDPM
(35.7M parameters on CIFAR-10) and, with residual resampling, DDPM++ (56.5M). Its decoder blocks are the features.

Names of parameters and the order in which they are registered are the published ones: published weights and optimizer
states load. Images are [N, C, H, W] in either memory order; layers compute in the dtype of their input, weights stay
fp32.
"""
from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.cli import UserError, nearest
from shared.cpu.kernels import attention, group_norm, repeat_then_convolve
from shared.cpu.winograd import convolve
from shared.training.randomness import Dropout

GROUPS, FINAL_GROUPS = 32, 8


class UNet(nn.Module):
    """x [N, C, H, W] and the network time t [N] or [1] -> [N, C, H, W].

    image_shape: (C, H, W); H and W multiples of 2^(levels - 1). ch_mults: one factor of n_channels per resolution,
    from the highest down. is_attn: whether the blocks of a resolution have attention. attn_channels_per_head: None is
    one head over all channels. n_blocks: residual blocks per resolution on the way down, one more on the way up.
    use_res_for_updown: resample by residual blocks (DDPM++) instead of convolutions. augment_dim: length of the
    augmentation labels, 0 for none. self_condition: name of the decoder block whose pooled output conditions all later
    blocks (DDAE++; see `condition`), None for the published network.

    Its decoder blocks are called out_1, out_2, ... in computing order (`block_names`); up-samplers have no name.
    Raises UserError for arguments that do not make a network.
    """

    def __init__(self, image_shape: Sequence[int] = (3, 32, 32), n_channels: int = 128,
                 ch_mults: Sequence[int] = (1, 2, 2, 2), is_attn: Sequence[bool] = (False, True, False, False),
                 attn_channels_per_head: int | None = None, dropout: float = 0.1, n_blocks: int = 2,
                 use_res_for_updown: bool = False, augment_dim: int = 0, self_condition: str | None = None) -> None:
        super().__init__()
        if not ch_mults or len(is_attn) != len(ch_mults):
            raise UserError(f"is_attn: expected one of true and false for each of the {len(ch_mults)} ch_mults, got "
                            f"{list(is_attn)}")
        if n_channels % 32:
            raise UserError(f"n_channels: expected a multiple of 32, got {n_channels}")
        factor = 2 ** (len(ch_mults) - 1)
        if len(image_shape) != 3 or image_shape[1] % factor or image_shape[2] % factor:
            raise UserError(f"image_shape: expected [channels, height, width], height and width being multiples of "
                            f"{factor} for {len(ch_mults)} ch_mults, got {list(image_shape)}")
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
            check_names([self_condition], self.widths)
            self.condition = SemanticCondition(self.widths[self_condition], emb_channels)

    @property
    def block_names(self) -> list[str]:
        """The decoder blocks, in computing order."""
        return list(self.widths)

    def forward(self, x: Tensor, t: Tensor, aug: Tensor | None = None, ret_activation: bool = False
                ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the output; with `ret_activation` also the outputs of all decoder blocks.

        aug: augmentation labels [N, augment_dim] or None, which is the same as zeros.
        """
        x, blocks = self._decode(x, t, aug, self.block_names if ret_activation else [], whole=True)
        out = self.final(F.silu(self.norm(x)))
        return (out, blocks) if ret_activation else out

    def features(self, x: Tensor, t: Tensor, names: Sequence[str] | None = None, aug: Tensor | None = None
                 ) -> dict[str, Tensor]:
        """Return the outputs [N, C', H', W'] of the decoder blocks `names` (None: all). The pass ends with the last of
        them. Raises UserError for a name that does not exist."""
        names = self.block_names if names is None else list(names)
        check_names(names, self.widths)
        _, blocks = self._decode(x, t, aug, names, whole=False)
        return {name: blocks[name] for name in names}

    def _decode(self, x: Tensor, t: Tensor, aug: Tensor | None, names: list[str], whole: bool
                ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the last output computed and those of the blocks `names`; unless `whole`, stop at the last of them."""
        emb = self.time_emb(t, aug)
        x = self.image_proj(x)
        skips = [x]
        for block in self.down:
            x = block(x, emb)
            skips.append(x)
        x = self.middle(x, emb)
        number, kept = 0, {}
        for block in self.up:
            if not isinstance(block, LevelBlock):
                x = block(x, emb)
                continue
            number += 1
            name = f"out_{number}"
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
            if name in names:
                kept[name] = x
                if not whole and len(kept) == len(set(names)):
                    break
            if name == self.self_condition:
                emb = emb + self.condition(x)
        return x, kept


def check_names(names: Sequence[str], known: Collection[str], source: str = "") -> None:
    """Raise UserError for a block that does not exist, naming the known ones."""
    for name in names:
        if name not in known:
            raise UserError(f"{source}this network has no block {name!r}{nearest(str(name), known)}; it has "
                            f"{', '.join(known)}")


class SemanticCondition(nn.Module):
    """A decoder block's output [N, channels, H, W] -> addition to the embedding of later blocks, [N, E].

    Self-conditioning of DDAE++ (arXiv 2505.10999): the block's globally pooled feature, which carries most of the
    semantics, is routed around the rest of the decoder. Here: mean over pixels, layer norm, two layers; the last one
    starts at zero, so training begins with the published network.
    """

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.lin1 = nn.Linear(channels, emb_channels)
        self.lin2 = nn.Linear(emb_channels, emb_channels)
        nn.init.zeros_(self.lin2.weight)
        nn.init.zeros_(self.lin2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.silu(self.lin1(self.norm(x.mean(dim=(2, 3), dtype=torch.float32)))))


def use_channels_last(net: UNet) -> None:
    """Let `net` compute in [N, H, W, C] memory order where that is faster; numbers change by rounding only."""
    if next(net.parameters()).is_cuda or net.n_channels >= 64:
        net.to(memory_format=torch.channels_last)  # images follow the weights of the first convolution


def store_bf16_weights(net: UNet) -> None:
    """Round the weights to bf16 once and for all, as autocast does in every call; for a trained network."""
    # Where a repetition is fused with a convolution, weights are summed before they are rounded.
    fused = {module.conv1 if isinstance(module, ResidualBlock) else module.conv for module in net.modules()
             if isinstance(module, Upsample) or isinstance(module, ResidualBlock) and module.up}
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in fused:
            module.weight.data = module.weight.data.to(torch.bfloat16)


class GroupNorm(nn.Module):
    """Normalisation over `groups` groups of channels, eps 1e-5. Raises UserError if they do not divide evenly."""

    casts_weights = True  # to the dtype of its input

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        if channels % groups:
            raise UserError(f"a layer of {channels} channels cannot be normalised in {groups} groups; "
                            f"n_channels times each of ch_mults must be a multiple of {groups}")
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, 1e-5)


class TimeEmbedding(nn.Module):
    """t [N] (or [1], for all images) and if wanted augmentation labels [N, augment_dim] -> [N, n_channels].

    Sines, then cosines of t·10000^(-k/(n_channels/8 - 1)), to which the projected labels are added, then two layers.
    t is used as it is: t/n_T or ln(σ)/4, never scaled.
    """

    def __init__(self, n_channels: int, augment_dim: int = 0) -> None:
        super().__init__()
        self.half = n_channels // 8
        if augment_dim:
            self.aug_emb = nn.Linear(augment_dim, n_channels // 4, bias=False)
        self.lin1 = nn.Linear(n_channels // 4, n_channels)
        self.lin2 = nn.Linear(n_channels, n_channels)

    def forward(self, t: Tensor, aug: Tensor | None = None) -> Tensor:
        exponents = torch.arange(self.half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (self.half - 1))
        angles = t.to(torch.float32)[:, None] * exponents.exp()
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if aug is not None and hasattr(self, "aug_emb"):
            emb = emb + self.aug_emb(aug)
        return self.lin2(F.silu(self.lin1(emb)))


class Conv3x3(nn.Conv2d):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias)


class ResidualBlock(nn.Module):
    """x [N, in_channels, H, W], emb [N or 1, time_channels] -> [N, out_channels, H', W'].

    With `up` (repetition) or `down` (2x2 mean) the normalised input and the skip connection are both resampled.
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, dropout: float = 0.1, up: bool = False,
                 down: bool = False) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.norm1 = GroupNorm(GROUPS, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Sequential(Dropout(dropout), Conv3x3(out_channels, out_channels))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.up:
            x, h = repeat(x), repeat_then_convolve(h, self.conv1.weight, self.conv1.bias)
        elif self.down:
            x, h = F.avg_pool2d(x, 2), self.conv1(F.avg_pool2d(h, 2))
        else:
            h = self.conv1(h)
        h = h + self.time_emb(emb)[:, :, None, None].to(h.dtype)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of x [N, n_channels, H, W], added to x; heads of `d_k` channels (None: one head).

    Raises UserError if the channels are no multiple of d_k.
    """

    def __init__(self, n_channels: int, d_k: int | None = None) -> None:
        super().__init__()
        self.d_k = n_channels if d_k is None else d_k
        self.heads = n_channels // self.d_k
        if self.heads * self.d_k != n_channels:
            raise UserError(f"attn_channels_per_head: {n_channels} channels cannot be shared by heads of {self.d_k}")
        self.norm = GroupNorm(GROUPS, n_channels)
        self.projection = nn.Linear(n_channels, 3 * self.heads * self.d_k)
        self.output = nn.Linear(self.heads * self.d_k, n_channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        # The two layers as 1x1 convolutions, which oneDNN computes faster on a CPU than MKL a product of matrices.
        qkv = F.conv2d(self.norm(x), self.projection.weight[:, :, None, None], self.projection.bias)
        qkv = qkv.permute(0, 2, 3, 1).reshape(n, height * width, self.heads, 3 * self.d_k).transpose(1, 2)
        out = attention(*qkv.chunk(3, dim=3))  # [N, heads, pixels, d_k]
        out = out.transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2)
        out = F.conv2d(out, self.output.weight[:, :, None, None], self.output.bias)
        # Attention leaves it pixel by pixel in memory, which would spread through a network that stores channels apart.
        return (out.contiguous() if x.is_contiguous() else out) + x


class Upsample(nn.Module):
    """Double height and width by repetition, then if `use_conv` convolve 3x3."""

    def __init__(self, n_channels: int, use_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_channels, n_channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return repeat(x) if self.conv is None else repeat_then_convolve(x, self.conv.weight, self.conv.bias)


class Downsample(nn.Module):
    """Halve height and width: a 3x3 convolution of stride 2 (rounding up), without `use_conv` a 2x2 mean."""

    def __init__(self, n_channels: int, use_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_channels, n_channels, 3, stride=2, padding=1) if use_conv else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(x)


class ResampleBlock(nn.Module):
    """A residual block that doubles or halves height and width."""

    def __init__(self, n_channels: int, time_channels: int, dropout: float, up: bool, down: bool) -> None:
        super().__init__()
        self.op = ResidualBlock(n_channels, n_channels, time_channels, dropout, up=up, down=down)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x, emb)


class LevelBlock(nn.Module):
    """A residual block, followed by attention if `attn`."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, attn: bool, d_k: int | None,
                 dropout: float) -> None:
        super().__init__()
        self.res = ResidualBlock(in_channels, out_channels, time_channels, dropout)
        self.attn = AttentionBlock(out_channels, d_k) if attn else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.res(x, emb)
        return x if self.attn is None else self.attn(x)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, n_channels: int, time_channels: int, d_k: int | None, dropout: float) -> None:
        super().__init__()
        self.res1 = ResidualBlock(n_channels, n_channels, time_channels, dropout)
        self.attn = AttentionBlock(n_channels, d_k)
        self.res2 = ResidualBlock(n_channels, n_channels, time_channels, dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.res2(self.attn(self.res1(x, emb)), emb)


def repeat(x: Tensor) -> Tensor:
    """Double height and width of x [N, C, H, W] by repeating every pixel."""
    return F.interpolate(x, scale_factor=2, mode="nearest")
