"""Random views for MSN's pre-training, of whole batches on the device: crop, mirror, colour jitter, grey, blur.

Draws are made on the host for the global batch; each rank applies its part.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.augment.views import Draws
from shared.data.photographs import MEAN, STD
from shared.training.precision import to_device

ASPECT = (3 / 4, 4 / 3)
JITTER, HUE, P_JITTER, P_GREY, P_BLUR = 0.4, 0.1, 0.8, 0.2, 0.5  # the published strength of 0.5
BLUR = (0.1, 2.0)    # radius in pixels of a view of 224
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ViewDraws(Draws):
    """Parameters of N views. area, aspect: of the window, float64 [N]; place: [N, 2], where in the room left (0..1).
    flip, grey: bool [N]. colour: [N, 4], factors of brightness, contrast and saturation, and turn of the hue in
    radians. blur: radius as a fraction of the side, [N], 0 for none."""

    area: np.ndarray
    aspect: np.ndarray
    place: np.ndarray
    flip: np.ndarray
    colour: np.ndarray
    grey: np.ndarray
    blur: np.ndarray


def draw_views(n: int, rng: np.random.Generator, area: tuple[float, float], flip: bool = True) -> ViewDraws:
    """Draw n views. area: bounds of the window's fraction of the image. flip: mirror half of them."""
    jitters = rng.random(n) < P_JITTER
    factors = np.where(jitters[:, None], rng.uniform(1 - JITTER, 1 + JITTER, (n, 3)), 1.0)
    turns = np.where(jitters, rng.uniform(-HUE, HUE, n) * 2 * np.pi, 0.0)
    radius = np.where(rng.random(n) < P_BLUR, rng.uniform(*BLUR, n) / 224, 0.0)
    return ViewDraws(rng.uniform(*area, n), np.exp(rng.uniform(*np.log(ASPECT), n)), rng.random((n, 2)),
                     (rng.random(n) < 0.5) & flip, np.column_stack([factors, turns]), rng.random(n) < P_GREY, radius)


def make_views(images: Tensor, draws: ViewDraws, size: int) -> Tensor:
    """Return views, float32 [N, 3, size, size], normalised. images: uint8 [N, C, H, W], C = 1 or 3."""
    x = crop(images.expand(-1, 3, -1, -1).float() / 255, draws, size)
    x = blur(jitter(x, draws), draws.blur * size)
    mean, std = (to_device(torch.tensor(values), x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def crop(x: Tensor, draws: ViewDraws, size: int) -> Tensor:
    """Cut out the windows, mirror and resize: float32 [N, 3, H, W] -> [N, 3, size, size], bilinear."""
    height, width = x.shape[2:]
    wide = np.minimum(1, np.sqrt(draws.area * draws.aspect * height / width))  # fractions of the image's sides
    tall = np.minimum(1, np.sqrt(draws.area / draws.aspect * width / height))
    # Grid coordinates run from -1 to 1 over the image, edge to edge.
    matrix = np.zeros((len(draws), 2, 3), np.float32)
    matrix[:, 0, 0] = np.where(draws.flip, -wide, wide)
    matrix[:, 1, 1] = tall
    matrix[:, 0, 2] = (2 * draws.place[:, 0] - 1) * (1 - wide)
    matrix[:, 1, 2] = (2 * draws.place[:, 1] - 1) * (1 - tall)
    grid = F.affine_grid(to_device(matrix, x.device), [len(draws), 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def jitter(x: Tensor, draws: ViewDraws) -> Tensor:
    """Change brightness, contrast, saturation and hue of [N, 3, S, S] in 0..1, in this order; make some grey."""
    factors = to_device(draws.colour.astype(np.float32), x.device)[:, :, None, None, None]
    luma = to_device(torch.tensor(LUMA), x.device).view(3, 1, 1)

    def grey() -> Tensor:
        return (x * luma).sum(1, keepdim=True)

    x = (x * factors[:, 0]).clamp(0, 1)
    x = torch.lerp(grey().mean((2, 3), keepdim=True), x, factors[:, 1]).clamp(0, 1)
    x = torch.lerp(grey(), x, factors[:, 2]).clamp(0, 1)
    x = torch.einsum("nij,njhw->nihw", to_device(hue_turns(draws.colour[:, 3]), x.device), x).clamp(0, 1)
    keeps = to_device((~draws.grey).astype(np.float32), x.device)[:, None, None, None]
    return torch.lerp(grey(), x, keeps)


def hue_turns(angles: np.ndarray) -> np.ndarray:
    """Return the matrices that turn the hue of RGB by angles [N] in radians, round the axis of grey: [N, 3, 3]."""
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return (cos * np.eye(3) + (1 - cos) * axis + sin * cross).astype(np.float32)


def blur(x: Tensor, radius: np.ndarray) -> Tensor:
    """Blur image i of [N, 3, S, S] by a Gaussian whose standard deviation is radius[i] pixels."""
    reach = math.ceil(3 * float(radius.max(initial=0)))
    if reach == 0 or reach >= x.shape[2]:
        return x
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / np.maximum(radius, 1e-3)[:, None]) ** 2)
    weights = to_device((weights / weights.sum(1, keepdims=True)).astype(np.float32), x.device)
    weights = weights.repeat_interleave(3, 0)[:, None]  # a kernel for each channel of each image
    x, shape = F.pad(x, [reach] * 4, mode="reflect").flatten(0, 1)[None], x.shape
    x = F.conv2d(x, weights[:, :, :, None], groups=len(weights))
    return F.conv2d(x, weights[:, :, None], groups=len(weights)).view(shape)
