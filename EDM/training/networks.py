"""The two U-Nets of EDM (Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv
2206.00364): SongUNet, which is DDPM++ and NCSN++ (Song et al., arXiv 2011.13456), and DhariwalUNet, which is ADM
(Dhariwal and Nichol, arXiv 2105.05233).

Class names, constructor arguments and parameter names are those of the published networks, so that published weights
load. Both are called as net(x, noise_labels, class_labels, augment_labels): x [N, in_channels, R, R], noise_labels [N]
or [1], class_labels one-hot [N, label_dim] or None, augment_labels [N, augment_dim] or None; they return
[N, out_channels, R, R].
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from EDM.training.layers import Conv2d, FourierEmbedding, GroupNorm, Init, Linear, PositionalEmbedding
from shared.cli import UserError
from shared.cpu.kernels import attention
from shared.training.dropout import Dropout


class UNetBlock(torch.nn.Module):
    """A residual block, conditioned on the embedding, with self-attention if `heads` > 0.

    The embedding [N, emb_channels] either is added to the features (`adaptive_scale` False) or scales and shifts them.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, init: Init, init_zero: Init,
                 init_attn: Init | None = None, up: bool = False, down: bool = False, heads: int = 0,
                 dropout: float = 0.0, skip_scale: float = 1.0, eps: float = 1e-5,
                 resample_filter: Sequence[float] = (1, 1), resample_proj: bool = False,
                 adaptive_scale: bool = True) -> None:
        super().__init__()
        self.heads, self.skip_scale, self.adaptive_scale = heads, skip_scale, adaptive_scale
        resample = dict(up=up, down=down, resample_filter=resample_filter)
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, init=init, **resample)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.dropout = Dropout(dropout)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, init=init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, init=init, **resample)
        if heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, kernel=1, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, init=init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        affine = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = affine.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + affine))
        h = self.conv1(self.dropout(h))
        x = self._merge(h, x if self.skip is None else self.skip(x))
        return self._merge(self.proj(self._attend(self.norm2(x))), x) if self.heads else x

    def _merge(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h + x if self.skip_scale == 1 else (h + x).mul_(self.skip_scale)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        # The published rows are ordered (head, channel, q|k|v). Attention wants q, k and v apart, and weights are
        # cheaper to reorder than activations.
        weight = self.qkv.weight.view(self.heads, -1, 3, c).permute(2, 0, 1, 3).reshape(3 * c, c, 1, 1)
        # As one tensor of its own, since torch.compile takes no reordered view for the bias of a convolution.
        bias = torch.cat([self.qkv.bias[part::3] for part in range(3)])
        qkv = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv)
        out = attention(q, k, v).transpose(2, 3).reshape(n, c, height, width)
        # Attention leaves it pixel by pixel in memory, which would spread through a network that stores channels apart.
        return out.contiguous() if x.is_contiguous() else out


class SongUNet(torch.nn.Module):
    """DDPM++ (positional embedding, standard encoder) and NCSN++ (fourier, residual encoder, filter [1, 3, 3, 1]).

    `channel_mult` has one entry per resolution, from `img_resolution` downwards by halves, and multiplies
    `model_channels`; attention runs at the resolutions `attn_resolutions` and at the deepest one. `encoder_type` and
    `decoder_type` choose how the image itself travels beside the features: not at all (standard), added to them (skip)
    or projected and merged with them (residual, encoder only). Raises UserError for a type that does not exist.
    """

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
                 augment_dim: int = 0, model_channels: int = 128, channel_mult: Sequence[int] = (1, 2, 2, 2),
                 channel_mult_emb: int = 4, num_blocks: int = 4, attn_resolutions: Sequence[int] = (16,),
                 dropout: float = 0.10, label_dropout: float = 0, embedding_type: str = "positional",
                 channel_mult_noise: int = 1, encoder_type: str = "standard", decoder_type: str = "standard",
                 resample_filter: Sequence[float] = (1, 1)) -> None:
        _expect("embedding_type", embedding_type, ("positional", "fourier"))
        _expect("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _expect("decoder_type", decoder_type, ("standard", "skip"))
        super().__init__()
        self.model_channels = model_channels
        self.label_dropout = Dropout(label_dropout, rescale=False)
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init, init_zero = Init("xavier_uniform"), Init("xavier_uniform", weight=1e-5)
        block = dict(emb_channels=emb_channels, dropout=dropout, skip_scale=math.sqrt(0.5), eps=1e-6,
                     resample_filter=resample_filter, resample_proj=True, adaptive_scale=False, init=init,
                     init_zero=init_zero, init_attn=Init("xavier_uniform", weight=math.sqrt(0.2)))

        self.map_noise = (PositionalEmbedding(noise_channels, endpoint=True) if embedding_type == "positional"
                          else FourierEmbedding(noise_channels))
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        self.enc = torch.nn.ModuleDict()
        skips, image_channels, channels = [], in_channels, in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, model_channels, kernel=3, init=init)
                channels = model_channels
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, down=True, **block)
                down = dict(down=True, resample_filter=resample_filter)
                if encoder_type == "skip":
                    self.enc[f"{res}x{res}_aux_down"] = Conv2d(image_channels, image_channels, kernel=0, **down)
                    self.enc[f"{res}x{res}_aux_skip"] = Conv2d(image_channels, channels, kernel=1, init=init)
                if encoder_type == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(image_channels, channels, kernel=3,
                                                                   fused_resample=True, init=init, **down)
                    image_channels = channels
            skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = UNetBlock(channels, model_channels * mult,
                                                                  heads=int(res in attn_resolutions), **block)
                channels = model_channels * mult
                skips.append(channels)

        self.dec = torch.nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, heads=1, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, up=True, **block)
            for index in range(num_blocks + 1):
                heads = int(index == num_blocks and res in attn_resolutions)
                self.dec[f"{res}x{res}_block{index}"] = UNetBlock(channels + skips.pop(), model_channels * mult,
                                                                  heads=heads, **block)
                channels = model_channels * mult
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(channel_mult) - 1:
                    self.dec[f"{res}x{res}_aux_up"] = Conv2d(out_channels, out_channels, kernel=0, up=True,
                                                             resample_filter=resample_filter)
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, out_channels, kernel=3, init=init_zero)

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips = self.encode(x, emb)
        return self.decode(skips, emb)

    def embed(self, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
              augment_labels: torch.Tensor | None) -> torch.Tensor:
        """Return the conditioning [N, emb_channels] of noise level, class and augmentation."""
        emb = self.map_noise(noise_labels)
        emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)  # sines before cosines
        if self.map_label is not None:
            labels = self.label_dropout(class_labels.to(emb.dtype), shape=(class_labels.shape[0], 1))
            emb = emb + self.map_label(labels * math.sqrt(labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x: torch.Tensor, emb: torch.Tensor) -> list[torch.Tensor]:
        """Return the features after every encoder module, the deepest last."""
        skips, image = [], x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                image = layer(image)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(image)
            elif "aux_residual" in name:
                x = skips[-1] = image = (x + layer(image)) / math.sqrt(2)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return skips

    def decode(self, skips: list[torch.Tensor], emb: torch.Tensor) -> torch.Tensor:
        """Return the output image, built from the deepest features upwards; empties `skips`."""
        x, image, normalised = skips[-1], None, None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                image = layer(image)
            elif "aux_norm" in name:
                normalised = layer(x)
            elif "aux_conv" in name:
                residual = layer(F.silu(normalised))
                image = residual if image is None else image + residual
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return image


class DhariwalUNet(torch.nn.Module):
    """ADM: features scaled and shifted by the embedding, 64 channels per attention head.

    Attention runs in every block at the resolutions `attn_resolutions` and at the deepest one, where a block has at
    least 64 channels; narrower blocks have no head and therefore none.
    """

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
                 augment_dim: int = 0, model_channels: int = 192, channel_mult: Sequence[int] = (1, 2, 3, 4),
                 channel_mult_emb: int = 4, num_blocks: int = 3, attn_resolutions: Sequence[int] = (32, 16, 8),
                 dropout: float = 0.10, label_dropout: float = 0) -> None:
        super().__init__()
        self.model_channels = model_channels
        self.label_dropout = Dropout(label_dropout, rescale=False)
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init("kaiming_uniform", weight=0, bias=0)
        block = dict(emb_channels=emb_channels, dropout=dropout, init=init, init_zero=init_zero)

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        self.map_label = (Linear(label_dim, emb_channels, bias=False,
                                 init=Init("kaiming_normal", weight=math.sqrt(label_dim))) if label_dim else None)

        if any(model_channels * mult < 64 and img_resolution >> level in attn_resolutions
               for level, mult in enumerate(channel_mult)):
            warnings.warn("blocks of fewer than 64 channels have no attention, whatever attn_resolutions says",
                          stacklevel=2)

        def heads(channels: int, res: int) -> int:
            return channels // 64 if res in attn_resolutions else 0

        self.enc = torch.nn.ModuleDict()
        skips, channels = [], in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, model_channels * mult, kernel=3, init=init)
                channels = model_channels * mult
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, down=True, **block)
            skips.append(channels)
            for index in range(num_blocks):
                wider = model_channels * mult
                self.enc[f"{res}x{res}_block{index}"] = UNetBlock(channels, wider, heads=heads(wider, res), **block)
                channels = wider
                skips.append(channels)

        self.dec = torch.nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, heads=channels // 64, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, up=True, **block)
            for index in range(num_blocks + 1):
                wider = model_channels * mult
                self.dec[f"{res}x{res}_block{index}"] = UNetBlock(channels + skips.pop(), wider,
                                                                  heads=heads(wider, res), **block)
                channels = wider
        self.out_norm = GroupNorm(channels)
        self.out_conv = Conv2d(channels, out_channels, kernel=3, init=init_zero)

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))

    def embed(self, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
              augment_labels: torch.Tensor | None) -> torch.Tensor:
        """Return the conditioning [N, emb_channels] of noise level, class and augmentation."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            labels = self.label_dropout(class_labels.to(emb.dtype), shape=(class_labels.shape[0], 1))
            emb = emb + self.map_label(labels)
        return F.silu(emb)


def use_channels_last(net: torch.nn.Module) -> None:
    """Let the U-Nets in `net` compute in [N, H, W, C] memory order where that is faster: on GPUs, and on a CPU if they
    are wide. Numbers change by rounding only."""
    for module in net.modules():
        if isinstance(module, (SongUNet, DhariwalUNet)):
            if next(module.parameters()).is_cuda or module.model_channels >= 64:
                module.to(memory_format=torch.channels_last)  # images follow the weights of the first convolution


def store_bf16_weights(net: torch.nn.Module) -> None:
    """Round the weights of convolutions and linear layers to bf16, which autocast would do in every call. For a network
    that is not trained further; under autocast its numbers stay the same."""
    for module in net.modules():
        # Where a repetition is fused with a convolution, weights are summed before they are rounded.
        if isinstance(module, (Conv2d, Linear)) and module.weight is not None and not getattr(module, "repeats", False):
            module.weight.data = module.weight.data.to(torch.bfloat16)


def _expect(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
