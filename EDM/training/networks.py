"""The networks of EDM (Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv
2206.00364): the U-Nets SongUNet, which is DDPM++ and NCSN++ (Song et al., arXiv 2011.13456), and DhariwalUNet, which is
ADM (Dhariwal and Nichol, arXiv 2105.05233), and the preconditioned denoisers around them.

Class names, constructor arguments and parameter names are those of the published networks, whose weights load. A U-Net
is called as net(x, noise_labels, class_labels, augment_labels): x [N, in_channels, R, R], noise_labels [N] or [1],
class_labels one-hot [N, label_dim] or None, augment_labels [N, augment_dim] or None; it returns
[N, out_channels, R, R].
 How a denoiser is called: see `Precond`.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from EDM.training.layers import Conv2d, FourierEmbedding, GroupNorm, Init, Linear, PositionalEmbedding, UNetBlock
from shared.cli import UserError, nearest
from shared.training.randomness import Dropout


def expect(name: str, value: str, known: Iterable[str]) -> None:
    """Raise UserError, which names the argument, unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"{name}: expected one of {', '.join(known)}, got {value!r}{nearest(value, known)}")


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
        expect("embedding_type", embedding_type, ("positional", "fourier"))
        expect("encoder_type", encoder_type, ("standard", "skip", "residual"))
        expect("decoder_type", decoder_type, ("standard", "skip"))
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
            res, width = img_resolution >> level, model_channels * mult
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
                heads = int(res in attn_resolutions)
                self.enc[f"{res}x{res}_block{index}"] = UNetBlock(channels, width, heads=heads, **block)
                channels = width
                skips.append(channels)

        self.dec = torch.nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res, width = img_resolution >> level, model_channels * mult
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, heads=1, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, up=True, **block)
            for index in range(num_blocks + 1):
                heads = int(index == num_blocks and res in attn_resolutions)
                self.dec[f"{res}x{res}_block{index}"] = UNetBlock(channels + skips.pop(), width, heads=heads, **block)
                channels = width
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(channel_mult) - 1:
                    self.dec[f"{res}x{res}_aux_up"] = Conv2d(out_channels, out_channels, kernel=0, up=True,
                                                             resample_filter=resample_filter)
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, out_channels, kernel=3, init=init_zero)

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        return self.decode(self.encode(x, emb), emb)

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
            warnings.warn("blocks of fewer than 64 channels have no attention, even at attn_resolutions",
                          stacklevel=2)

        def heads(channels: int, res: int) -> int:
            return channels // 64 if res in attn_resolutions else 0

        self.enc = torch.nn.ModuleDict()
        skips, channels = [], in_channels
        for level, mult in enumerate(channel_mult):
            res, width = img_resolution >> level, model_channels * mult
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, width, kernel=3, init=init)
                channels = width
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, down=True, **block)
            skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = UNetBlock(channels, width, heads=heads(width, res), **block)
                channels = width
                skips.append(channels)

        self.dec = torch.nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res, width = img_resolution >> level, model_channels * mult
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, heads=channels // 64, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, up=True, **block)
            for index in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{index}"] = UNetBlock(channels + skips.pop(), width,
                                                                  heads=heads(width, res), **block)
                channels = width
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


# ------------------------------------------------------------------------------------------------- preconditioning

UNETS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def constructor_kwargs(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that rebuild a network, from the local names of its constructor."""
    arguments = {name: value for name, value in scope.items() if name not in ("self", "__class__", "model_kwargs")}
    return {**arguments, **scope.get("model_kwargs", {})}


def edm_coefficients(sigma: torch.Tensor, sigma_data: float) -> tuple[torch.Tensor, ...]:
    """Return c_skip, c_out, c_in and c_noise of EDM, each [N, 1, 1, 1], for noise levels of that shape."""
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance.sqrt(), 1 / variance.sqrt(), sigma.log() / 4


def vp_time(sigma: torch.Tensor | float, beta_d: float, beta_min: float) -> torch.Tensor:
    """Return the time at which the variance-preserving SDE has the noise level sigma."""
    log = (1 + torch.as_tensor(sigma) ** 2).log()
    return ((beta_min**2 + 2 * beta_d * log).sqrt() - beta_min) / beta_d


class Precond(torch.nn.Module):
    """D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise): a raw network F turned into an estimate of the clean image, with
    the coefficients of table 1 that `coefficients` of the subclass gives.

    Called as net(x, sigma, class_labels, augment_labels=augment_labels): x [N, C, R, R] in any float dtype, sigma [N]
    or a scalar, class_labels one-hot [N, label_dim] or None for no class; returns float32 [N, C, R, R]. F computes in
    fp16 if `use_fp16` and on a GPU. `init_kwargs`: the constructor's keywords, which a snapshot keeps.
    """

    def __init__(self, scope: Mapping[str, Any], out_channels: int) -> None:
        super().__init__()
        self.init_kwargs = constructor_kwargs(scope)
        for name in self.init_kwargs:
            if name not in scope["model_kwargs"] and name != "model_type":
                setattr(self, name, scope[name])
        expect("model_type", scope["model_type"], UNETS)
        self.model = UNETS[scope["model_type"]](self.img_resolution, self.img_channels, out_channels, self.label_dim,
                                                **scope["model_kwargs"])

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        if self.label_dim == 0:
            labels = None
        elif class_labels is None:
            labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        dtype = torch.float16 if self.use_fp16 and not force_fp32 and x.is_cuda else torch.float32
        out = self.model((c_in * x).to(dtype), c_noise.flatten(), labels, augment_labels)
        return c_skip * x + c_out * out[:, :self.img_channels].to(torch.float32)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return the nearest noise levels that the network knows, in the shape and dtype of sigma: here, sigma."""
        return torch.as_tensor(sigma)


class EDMPrecond(Precond):
    """EDM: unit variance of the network's input and target at every σ. sigma_data: standard deviation of images."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0, sigma_max: float = float("inf"), sigma_data: float = 0.5,
                 model_type: str = "DhariwalUNet", **model_kwargs: Any) -> None:
        super().__init__(locals(), img_channels)

    def coefficients(self, sigma: torch.Tensor) -> tuple[Any, ...]:
        return edm_coefficients(sigma, self.sigma_data)


class VPPrecond(Precond):
    """The variance-preserving SDE of Song et al. (arXiv 2011.13456), with M discrete times and ε_t the smallest one."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5,
                 model_type: str = "SongUNet", **model_kwargs: Any) -> None:
        super().__init__(locals(), img_channels)
        with torch.device("cpu"):  # numbers also where the network itself is built without memory
            self.sigma_min, self.sigma_max = float(self.sigma(epsilon_t)), float(self.sigma(1))

    def coefficients(self, sigma: torch.Tensor) -> tuple[Any, ...]:
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Return the noise level at time t in float32; near 0 digits cancel, as in the published limits."""
        t = torch.as_tensor(t, dtype=torch.float32)
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).exp().sub(1).sqrt()

    def sigma_inv(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return the time t at which the noise level is sigma."""
        return vp_time(sigma, self.beta_d, self.beta_min)


class VEPrecond(Precond):
    """The variance-exploding SDE of Song et al. (arXiv 2011.13456)."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0.02, sigma_max: float = 100, model_type: str = "SongUNet",
                 **model_kwargs: Any) -> None:
        super().__init__(locals(), img_channels)

    def coefficients(self, sigma: torch.Tensor) -> tuple[Any, ...]:
        return 1, sigma, 1, (0.5 * sigma).log()


class iDDPMPrecond(Precond):
    """Improved DDPM (Nichol and Dhariwal, arXiv 2102.09672): M discrete noise levels, a network that also predicts
    variances (the second half of its 2·C output channels, which is not used)."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 C_1: float = 0.001, C_2: float = 0.008, M: int = 1000, model_type: str = "DhariwalUNet",
                 **model_kwargs: Any) -> None:
        super().__init__(locals(), 2 * img_channels)
        with torch.device("cpu"):  # numbers also where the network itself is built without memory
            u = [torch.zeros(())]
            alpha_bar = self.alpha_bar(torch.arange(M + 1))
            for j in range(M, 0, -1):
                ratio = (alpha_bar[j - 1] / alpha_bar[j]).clamp(min=C_1)
                u.append(((u[-1] ** 2 + 1) / ratio - 1).sqrt())
            self.register_buffer("u", torch.stack(u[::-1]))  # noise levels u_0 > ... > u_M = 0
        self.sigma_min, self.sigma_max = float(self.u[M - 1]), float(self.u[0])

    def coefficients(self, sigma: torch.Tensor) -> tuple[Any, ...]:
        c_noise = self.M - 1 - self.round_sigma(sigma, return_index=True).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def alpha_bar(self, j: torch.Tensor) -> torch.Tensor:
        """Return sin²(πj / (2M(C_2 + 1))) in float32; another order of rounding moves the table by 5e-5."""
        return (0.5 * math.pi * j.to(torch.float32) / self.M / (self.C_2 + 1)).sin() ** 2

    def round_sigma(self, sigma: torch.Tensor | float, return_index: bool = False) -> torch.Tensor:
        """Return the nearest of the M + 1 noise levels (the larger one on a tie) in the shape and dtype of sigma, or
        its index as int64."""
        sigma = torch.as_tensor(sigma)
        wanted = sigma.to(self.u.device, torch.float32).reshape(-1)
        # The table falls, so the first level not above `wanted` and its predecessor are the candidates.
        after = torch.searchsorted(-self.u, -wanted).clamp(1, self.M)
        closer = (self.u[after - 1] - wanted).abs() <= (self.u[after] - wanted).abs()
        index = torch.where(closer, after - 1, after)
        return index.reshape(sigma.shape) if return_index else self.u[index].to(sigma.dtype).reshape(sigma.shape)


PRECONDITIONERS = {"EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond, "VEPrecond": VEPrecond,
                   "iDDPMPrecond": iDDPMPrecond}
