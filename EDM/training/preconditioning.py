"""Preconditioned denoisers D(x; σ, class, augmentation): they turn a raw network F into an estimate of the clean image.

D = c_skip·x + c_out·F(c_in·x; c_noise), with the coefficients of table 1 of "Elucidating the Design Space of
Diffusion-Based Generative Models" (Karras et al., arXiv 2206.00364) for VP, VE, iDDPM and EDM. Every class is called as
net(x, sigma, class_labels, augment_labels=augment_labels): x [N, C, R, R] in any float dtype, sigma [N] or a scalar,
class_labels one-hot [N, label_dim] or None for no class, augment_labels [N, augment_dim] or None; it returns float32
[N, C, R, R]. Class names, constructor arguments and parameter names are those of the published networks; `init_kwargs`
holds the constructor's arguments as keywords, which a snapshot keeps.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from EDM.training.networks import DhariwalUNet, SongUNet
from shared.cli import UserError, nearest

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class EDMPrecond(torch.nn.Module):
    """EDM: unit variance of the network's input and target at every σ, where images have deviation `sigma_data`."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0, sigma_max: float = float("inf"), sigma_data: float = 0.5,
                 model_type: str = "DhariwalUNet", **model_kwargs: Any) -> None:
        super().__init__()
        self.init_kwargs = as_called(locals())
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max, self.sigma_data = use_fp16, sigma_min, sigma_max, sigma_data
        self.model = build_network(model_type, img_resolution, img_channels, img_channels, label_dim, model_kwargs)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        variance = sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt()
        c_in, c_noise = 1 / variance.sqrt(), sigma.log() / 4
        return c_skip * x + c_out * call_network(self, c_in * x, c_noise, class_labels, augment_labels, force_fp32)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return sigma as it is: every noise level is allowed."""
        return torch.as_tensor(sigma)


class VPPrecond(torch.nn.Module):
    """The variance-preserving SDE of Song et al. (arXiv 2011.13456), with M discrete times and ε_t the smallest one."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5,
                 model_type: str = "SongUNet", **model_kwargs: Any) -> None:
        super().__init__()
        self.init_kwargs = as_called(locals())
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.beta_d, self.beta_min, self.M, self.epsilon_t = use_fp16, beta_d, beta_min, M, epsilon_t
        self.sigma_min, self.sigma_max = float(self.sigma(epsilon_t)), float(self.sigma(1))
        self.model = build_network(model_type, img_resolution, img_channels, img_channels, label_dim, model_kwargs)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_in, c_noise = 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)
        return x - sigma * call_network(self, c_in * x, c_noise, class_labels, augment_labels, force_fp32)

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Return the noise level at time t in float32. Near 0 its digits cancel; the published limits have that in."""
        t = torch.as_tensor(t, dtype=torch.float32)
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).exp().sub(1).sqrt()

    def sigma_inv(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return the time t at which the noise level is sigma."""
        log = (1 + torch.as_tensor(sigma) ** 2).log()
        return ((self.beta_min**2 + 2 * self.beta_d * log).sqrt() - self.beta_min) / self.beta_d

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return sigma as it is: every noise level is allowed."""
        return torch.as_tensor(sigma)


class VEPrecond(torch.nn.Module):
    """The variance-exploding SDE of Song et al. (arXiv 2011.13456)."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 sigma_min: float = 0.02, sigma_max: float = 100, model_type: str = "SongUNet",
                 **model_kwargs: Any) -> None:
        super().__init__()
        self.init_kwargs = as_called(locals())
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max = use_fp16, sigma_min, sigma_max
        self.model = build_network(model_type, img_resolution, img_channels, img_channels, label_dim, model_kwargs)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_noise = (0.5 * sigma).log()
        return x + sigma * call_network(self, x, c_noise, class_labels, augment_labels, force_fp32)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return sigma as it is: every noise level is allowed."""
        return torch.as_tensor(sigma)


class iDDPMPrecond(torch.nn.Module):
    """Improved DDPM (Nichol and Dhariwal, arXiv 2102.09672): M discrete noise levels, a network that also predicts
    variances (the second half of its 2·C output channels, which is not used)."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 C_1: float = 0.001, C_2: float = 0.008, M: int = 1000, model_type: str = "DhariwalUNet",
                 **model_kwargs: Any) -> None:
        super().__init__()
        self.init_kwargs = as_called(locals())
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.C_1, self.C_2, self.M = use_fp16, C_1, C_2, M
        self.model = build_network(model_type, img_resolution, img_channels, 2 * img_channels, label_dim, model_kwargs)
        u = [torch.zeros(())]
        alpha_bar = self.alpha_bar(torch.arange(M + 1))
        for j in range(M, 0, -1):
            ratio = (alpha_bar[j - 1] / alpha_bar[j]).clamp(min=C_1)
            u.append(((u[-1] ** 2 + 1) / ratio - 1).sqrt())
        self.register_buffer("u", torch.stack(u[::-1]))  # noise levels u_0 > ... > u_M = 0
        self.sigma_min, self.sigma_max = float(self.u[M - 1]), float(self.u[0])

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None,
                force_fp32: bool = False, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_in = 1 / (sigma**2 + 1).sqrt()
        c_noise = self.M - 1 - self.round_sigma(sigma, return_index=True).to(torch.float32)
        out = call_network(self, c_in * x, c_noise, class_labels, augment_labels, force_fp32)
        return x - sigma * out[:, :self.img_channels]

    def alpha_bar(self, j: torch.Tensor) -> torch.Tensor:
        """Return sin²(πj / (2M(C_2 + 1))) in float32.

        The operations are rounded one by one in the published order: another order moves the table by 5e-5.
        """
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


def as_called(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a constructor from its local names: what rebuilds the same network."""
    arguments = {name: value for name, value in scope.items() if name not in ("self", "__class__", "model_kwargs")}
    return {**arguments, **scope["model_kwargs"]}


def build_network(model_type: str, img_resolution: int, in_channels: int, out_channels: int, label_dim: int,
                  model_kwargs: Mapping[str, Any]) -> torch.nn.Module:
    """Return the raw network of a preconditioner; UserError for a model_type that is not a key of NETWORKS."""
    if model_type not in NETWORKS:
        raise UserError(f"model_type: expected one of {', '.join(NETWORKS)}, got {model_type!r}"
                        f"{nearest(model_type, NETWORKS)}")
    return NETWORKS[model_type](img_resolution=img_resolution, in_channels=in_channels, out_channels=out_channels,
                                label_dim=label_dim, **model_kwargs)


def call_network(net: torch.nn.Module, scaled: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None,
                 augment_labels: torch.Tensor | None, force_fp32: bool) -> torch.Tensor:
    """Return F(scaled; c_noise) of the preconditioner `net` in float32.

    A conditional network that is given no labels sees one row of zeros, an unconditional one sees None. F computes in
    fp16 if the preconditioner was built so and runs on a GPU.
    """
    if net.label_dim == 0:
        labels = None
    elif class_labels is None:
        labels = torch.zeros([1, net.label_dim], device=scaled.device)
    else:
        labels = class_labels.to(torch.float32).reshape(-1, net.label_dim)
    half = net.use_fp16 and not force_fp32 and scaled.device.type == "cuda"
    out = net.model(scaled.to(torch.float16 if half else torch.float32), c_noise.flatten(), labels, augment_labels)
    return out.to(torch.float32)
