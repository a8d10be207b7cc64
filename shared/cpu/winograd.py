"""3x3 convolutions of wide networks on a CPU with a quarter of the multiplications ("Fast Algorithms for Convolutional
Neural Networks", Lavin and Gray, arXiv 1509.09308; Toom and Cook's way to multiply polynomials).

An image is cut into tiles of 6x6 pixels, 4 apart. Sums over its pixels turn a tile into 36 numbers a channel, and the
weight into 36 matrices; the products of the two, one matrix product for each of the 36, are summed into the 4x4 pixels
of the result: 36 multiplications a channel pair where 144 were. Gradients are the transposed of these three steps.
Against float64 the result is off by 2e-6 (root mean square, in units of its own), a direct convolution by 1e-6.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shared.cpu.kernels import is_channels_last

# Where the polynomials are evaluated, besides infinity; of those tried, these points give the smallest rounding errors.
POINTS = (0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2))
PIXELS = 4096  # of a part of the batch, whose tiles then stay in the processor's cache


def _matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the transforms of tiles [36, 36], of weights [36, 9], and from products to results [16, 36]."""
    def powers(count: int) -> np.ndarray:
        return np.vstack([np.power.outer(POINTS, np.arange(count)), np.arange(count) == count - 1])

    parts = np.linalg.inv(powers(6)).T, powers(3), powers(4).T
    return tuple(torch.from_numpy(np.kron(part, part)).to(torch.float32) for part in parts)


OF_TILES, OF_WEIGHTS, TO_RESULTS = _matrices()


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [N, C, H, W] convolved by `weight` [K, C, 3, 3] or [K, C, 1, 1], of the same height and width."""
    if Winograd.is_faster(x, weight):
        return Winograd.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


class Winograd(torch.autograd.Function):
    """A 3x3 convolution with padding 1. x [N, C, H, W] channels_last, H and W multiples of 4; weight [K, C, 3, 3]."""

    @staticmethod
    def is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Return whether this works for x and is faster: its transforms cost per channel what 50 channels save."""
        n, c, height, width = x.shape
        return (weight.shape[2] == 3 and min(c, len(weight)) >= 128 and n * height * width >= 512
                and height % 4 == width % 4 == 0 and x.device.type == "cpu" and is_channels_last(x)
                and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
                and not torch.compiler.is_compiling())

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        n, _, height, width = x.shape
        weights = _transformed(weight).transpose(1, 2)
        out = x.new_empty(n, height, width, len(weight))
        for part, result in zip(*(_parts(images, height * width) for images in (x, out)), strict=True):
            results = TO_RESULTS @ torch.bmm(_tiles(part), weights).flatten(1)
            blocks = _blocks(result)
            torch.add(results.view(blocks.shape), 0 if bias is None else bias, out=blocks)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (k, c), (n, _, height, width) = weight.shape[:2], x.shape
        wants_x, wants_weight, _ = ctx.needs_input_grad
        weights = _transformed(weight) if wants_x else None
        grad = grad.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        grad_x, grad_weights = x.new_empty(n, height, width, c), x.new_zeros(36, k, c)
        for part, of_x, of_out in zip(*(_parts(images, height * width) for images in (x, grad_x, grad)), strict=True):
            of_products = (TO_RESULTS.T @ _blocks(of_out).reshape(16, -1)).view(36, -1, k)
            if wants_weight:
                grad_weights.baddbmm_(of_products.transpose(1, 2), _tiles(part))
            if wants_x:
                _sum_of_tiles(OF_TILES.T @ torch.bmm(of_products, weights).flatten(1), of_x)
        grad_weight = (OF_WEIGHTS.T @ grad_weights.flatten(1)).view(3, 3, k, c).permute(2, 3, 0, 1)
        return (grad_x.permute(0, 3, 1, 2) if wants_x else None, grad_weight if wants_weight else None,
                grad.sum((0, 1, 2)) if ctx.biased else None)


def _parts(images: torch.Tensor, pixels: int) -> tuple[torch.Tensor, ...]:
    """Split [N, ...], of so many pixels an image."""
    return images.split(max(1, PIXELS // pixels))


def _transformed(weight: torch.Tensor) -> torch.Tensor:
    """[K, C, 3, 3] -> [36, K, C]."""
    return (OF_WEIGHTS @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, *weight.shape[:2])


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """[n, C, H, W] -> the transformed tiles [36, tiles, C]."""
    n, c, height, width = x.shape
    padded = x.new_empty(n, height + 2, width + 2, c)
    for edge in (padded[:, 0], padded[:, -1], padded[:, :, 0], padded[:, :, -1]):
        edge.zero_()
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)
    return (OF_TILES @ tiles.reshape(36, -1)).view(36, -1, c)


def _sum_of_tiles(tiles: torch.Tensor, out: torch.Tensor) -> None:
    """Add up tiles [36, tiles · C], each in its place, to the images out [n, H, W, C]."""
    n, height, width, c = out.shape
    tiles = tiles.view(6, 6, n, height // 4, width // 4, c)
    total = tiles.new_empty(n, height + 4, width + 4, c)
    total[:, -4:], total[:, :, -4:] = 0, 0
    blocks = _blocks(total)
    blocks[:, :, :, :-1, :-1] = tiles[:4, :4]
    blocks[:2, :, :, 1:, :-1] += tiles[4:, :4]  # a tile reaches two pixels into the next ones
    blocks[:, :2, :, :-1, 1:] += tiles[:4, 4:]
    blocks[:2, :2, :, 1:, 1:] += tiles[4:, 4:]
    out.copy_(total[:, 1:-3, 1:-3])


def _blocks(images: torch.Tensor) -> torch.Tensor:
    """View [n, H, W, C] as [4, 4, n, H/4, W/4, C]: the place within blocks of 4x4 pixels comes first."""
    return images.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).permute(2, 4, 0, 1, 3, 5)
