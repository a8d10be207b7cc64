"""Weak and strong augmentation of whole batches on the device: uint8 images in, normalised floats out.

Draws and their application are separate. `draw_weak` and `draw_strong` take a host generator and return small arrays
for the *global* batch; each rank takes its part (`draws[world.slice(n)]`); `weak` and `strong` apply them:

    draws = draw_weak(n, numpy_rng(seed, step, "weak"), size, policy)
    labelled = weak(images, draws, mean, std)
    twice = weak(strong(images, draw_strong(n, rng, size)), other_draws, mean, std)

Nothing here waits for the device.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.augment import randaugment
from shared.augment.randaugment import OPERATIONS, RANGES
from shared.cli import UserError
from shared.training.precision import to_device

PAD_MODES = ("reflect", "zero")
CUTOUT_COLOUR = (125, 123, 114)


@dataclass(frozen=True)
class WeakPolicy:
    """The weak augmentation; the defaults are those of CIFAR: flip half of the images, crop with padding 4.

    flip: mirror horizontally with probability 1/2.
    pad: pixels by which the window may reach over each side, so a shift is drawn from -pad..pad.
    pad_mode: pixels outside: "reflect" (mirrored without repeating the edge pixel) or "zero" (black).
    subpixel: shift by any real number of pixels, with bilinear interpolation; needs pad_mode "zero".
    crop: side of the window; None for the size of the image.
    """

    flip: bool = True
    pad: int = 4
    pad_mode: str = "reflect"
    subpixel: bool = False
    crop: int | None = None

    def __post_init__(self) -> None:
        if self.pad_mode not in PAD_MODES:
            raise UserError(f'weak augmentation: pad_mode is one of {", ".join(PAD_MODES)}, not "{self.pad_mode}"')
        if self.subpixel and (self.pad_mode != "zero" or self.crop is not None):
            raise UserError("weak augmentation: a subpixel shift needs pad_mode zero and no crop")


class Draws:
    """Parameters of N augmentations; `draws[part]` selects some of them."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, part: slice | np.ndarray) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[part] for name, value in values.items() if isinstance(value, np.ndarray)})


@dataclass(frozen=True)
class WeakDraws(Draws):
    """Parameters of N weak augmentations.

    flip: bool [N]. top, left: [N], where the window begins in the (flipped) image, int64, or float32 for a subpixel
    shift; negative values reach into the padding. window: (height, width) of the output. pad_mode: as in WeakPolicy.
    """

    flip: np.ndarray
    top: np.ndarray
    left: np.ndarray
    window: tuple[int, int]
    pad_mode: str = "reflect"


@dataclass(frozen=True)
class StrongDraws(Draws):
    """Parameters of N strong augmentations: K operations one after another, then Cutout.

    operations: int64 [N, K], positions in OPERATIONS. magnitudes: float64 [N, K], within RANGES. cutout_fraction:
    float64 [N], side of the square as a fraction of the width. cutout_centre: float64 [N, 2], (x, y) in pixels.
    """

    operations: np.ndarray
    magnitudes: np.ndarray
    cutout_fraction: np.ndarray
    cutout_centre: np.ndarray


def draw_weak(n: int, rng: np.random.Generator, size: tuple[int, int], policy: WeakPolicy | None = None) -> WeakDraws:
    """Draw n weak augmentations of images of `size` (height, width); UserError if they are too small for the policy."""
    policy = policy or WeakPolicy()
    window = (policy.crop, policy.crop) if policy.crop else tuple(size)
    if policy.pad_mode == "reflect" and policy.pad >= min(size):
        raise UserError(f"weak augmentation: padding {policy.pad} by reflection needs larger images than "
                        f"{size[0]}x{size[1]}; use a smaller pad, or pad_mode zero")
    if any(side + 2 * policy.pad < wanted for side, wanted in zip(size, window, strict=True)):
        raise UserError(f"weak augmentation: no window of {window[0]}x{window[1]} in images of {size[0]}x{size[1]} "
                        f"padded by {policy.pad}")
    flip = rng.random(n) < 0.5 if policy.flip else np.zeros(n, bool)
    if policy.subpixel:
        top, left = rng.uniform(-policy.pad, policy.pad, (2, n)).astype(np.float32)
    else:
        top, left = (rng.integers(-policy.pad, side - wanted + policy.pad + 1, n)
                     for side, wanted in zip(size, window, strict=True))
    return WeakDraws(flip, top, left, window, policy.pad_mode)


def draw_strong(n: int, rng: np.random.Generator, size: tuple[int, int], n_operations: int = 3,
                max_cutout: float = 0.5) -> StrongDraws:
    """Draw n strong augmentations of images of `size` (height, width).

    Operations are drawn uniformly with replacement, magnitudes uniformly within RANGES, the side of the cutout up to
    `max_cutout` of the width.
    """
    operations = rng.integers(0, len(OPERATIONS), (n, n_operations))
    low, high = np.array(list(RANGES.values()), dtype=np.float64).T
    magnitudes = rng.uniform(low[operations], high[operations])
    fraction = rng.uniform(0, max_cutout, n)
    # The published centre lies in (1, width] x (1, height], not in [0, width) x [0, height).
    height, width = size
    centre = np.stack([side + (1 - side) * rng.random(n) for side in (width, height)], axis=1)
    return StrongDraws(operations, magnitudes, fraction, centre)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (images / 255 - mean) / std as float32 [N, C, H, W]; mean and std per channel, on the scale 0..1.

    images: values 0..255, of any dtype.
    """
    mean, std = np.asarray(mean, np.float64).reshape(-1, 1, 1), np.asarray(std, np.float64).reshape(-1, 1, 1)
    scale = to_device((1 / (255 * std)).astype(np.float32), images.device)
    shift = to_device((-mean / std).astype(np.float32), images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


def weak(images: Tensor, draws: WeakDraws, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Flip, shift and normalise: uint8 [N, C, H, W] -> float32 [N, C, *draws.window]."""
    moved = shift_bilinear(images, draws) if draws.top.dtype.kind == "f" else shift_whole(images, draws)
    return normalise(moved, mean, std)


def shift_whole(images: Tensor, draws: WeakDraws) -> Tensor:
    """Flip, pad and cut out the window by whole pixels: uint8 [N, C, H, W] -> uint8 [N, C, *draws.window]."""
    count, channels, height, width = images.shape
    rows = draws.top[:, None] + np.arange(draws.window[0])
    columns = draws.left[:, None] + np.arange(draws.window[1])
    inside = None
    if draws.pad_mode == "zero":
        inside = [(at >= 0) & (at < side) for at, side in ((rows, height), (columns, width))]
        rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    else:
        rows, columns = (side - 1 - np.abs(side - 1 - np.abs(at)) for at, side in ((rows, height), (columns, width)))
    columns = np.where(draws.flip[:, None], width - 1 - columns, columns)
    rows, columns = to_device(rows * width, images.device), to_device(columns, images.device)
    source = (rows.unsqueeze(2) + columns.unsqueeze(1)).flatten(1).unsqueeze(1)
    cut = images.flatten(2).gather(2, source.expand(-1, channels, -1)).reshape(count, channels, *draws.window)
    if inside is not None:
        rows, columns = (to_device(here, images.device) for here in inside)
        cut *= (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
    return cut


def shift_bilinear(images: Tensor, draws: WeakDraws) -> Tensor:
    """Flip and shift by fractions of a pixel, black outside: uint8 [N, C, H, W] -> float32 [N, C, H, W], 0..255."""
    height, width = images.shape[2:]
    # Grid coordinates run from -1 to 1 over the image, edge to edge.
    matrix = np.zeros((len(draws), 2, 3), np.float32)
    matrix[:, 0, 0] = np.where(draws.flip, -1, 1)
    matrix[:, 1, 1] = 1
    matrix[:, 0, 2] = matrix[:, 0, 0] * draws.left * 2 / width
    matrix[:, 1, 2] = draws.top * 2 / height
    grid = F.affine_grid(to_device(matrix, images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def strong(images: Tensor, draws: StrongDraws, cutout_colour: tuple[int, ...] | None = None) -> Tensor:
    """Apply the operations, then Cutout: uint8 [N, C, H, W] -> uint8 [N, C, H, W]. The weak augmentation comes after.

    cutout_colour: one value 0..255 a channel; None for the published (125, 123, 114), or its grey on one channel.
    """
    return cutout(randaugment.apply(images, draws.operations, draws.magnitudes), draws, cutout_colour)


def strong_photographs(images: Sequence[Tensor], draws: StrongDraws, with_cutout: bool = True) -> list[Tensor]:
    """Do as `strong` for photographs uint8 [C, H, W] of different sizes, as few operations on one canvas."""
    sizes = np.array([image.shape[1:] for image in images])
    canvas = images[0].new_zeros(len(images), images[0].shape[0], *sizes.max(0))
    for place, image in zip(canvas, images, strict=True):
        place[:, :image.shape[1], :image.shape[2]] = image
    canvas = randaugment.apply_on_canvas(canvas, sizes, draws.operations, draws.magnitudes)
    if with_cutout:
        canvas = cutout(canvas, draws, sizes=sizes)
    return [image[:, :height, :width] for image, (height, width) in zip(canvas, sizes, strict=True)]


def cutout(images: Tensor, draws: StrongDraws, colour: tuple[int, ...] | None = None,
           sizes: np.ndarray | None = None) -> Tensor:
    """Paint a square of one colour (DeVries and Taylor 2017): uint8 [N, C, H, W] -> uint8 [N, C, H, W].

    As published, the square's side follows the width alone, its last row and column belong to it, and so at least one
    pixel is painted. sizes: of images in the upper left of larger canvases, [N, 2].
    """
    channels, height, width = images.shape[1:]
    heights, widths = np.full((2, len(images)), [[height], [width]]) if sizes is None else sizes.T
    if colour is None:
        colour = CUTOUT_COLOUR if channels == 3 else (123,)
    side = draws.cutout_fraction * widths

    def covered(centre: np.ndarray, lengths: np.ndarray, longest: int) -> np.ndarray:
        first = np.trunc(np.maximum(0, centre - side / 2))
        last = np.trunc(np.minimum(lengths, first + side))
        return (np.arange(longest) >= first[:, None]) & (np.arange(longest) <= last[:, None])

    columns = to_device(covered(draws.cutout_centre[:, 0], widths, width), images.device)
    rows = to_device(covered(draws.cutout_centre[:, 1], heights, height), images.device)
    square = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
    paint = to_device(np.array(colour, np.uint8).reshape(1, -1, 1, 1), images.device)
    return (images * ~square).add_(paint * square)  # several times faster than torch.where on bytes


def rotate_quarter_turns(images: Tensor, turns: np.ndarray) -> Tensor:
    """Rotate image i of [N, C, S, S], any dtype, by turns[i] quarter turns counter-clockwise (integers [N], 0..3)."""
    order = np.argsort(turns, kind="stable")
    starts = np.searchsorted(turns[order], np.arange(5))
    images = images.index_select(0, to_device(order, images.device))
    turned = torch.cat([images[starts[k]:starts[k + 1]].rot90(k, (2, 3)) for k in range(4)])
    return turned.index_select(0, to_device(np.argsort(order), images.device))
