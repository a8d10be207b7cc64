"""RandAugment's 14 image operations (Cubuk et al. 2020) on batches, byte for byte those of Pillow.

Images are uint8 [N, C, H, W] with C = 3 (Pillow's mode RGB) or 1 (mode L), on any device. Operations and magnitudes are
known on the host, so images are grouped by operation without waiting for the device: `apply` sorts the batch, and every
operation works on one contiguous part. A GPU computes all operations for every image in a few compiled kernels, which
takes less time than to start them one by one.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from shared.training.precision import can_compile, to_device

# Range of the magnitude v of an operation, drawn uniformly. The geometric ones stand together: one call computes them.
RANGES = {
    "Identity": (0, 1),
    "Rotate": (-30, 30),         # degrees, counter-clockwise
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "TranslateX": (-0.3, 0.3),   # fraction of the width
    "TranslateY": (-0.3, 0.3),   # fraction of the height
    "Posterize": (4, 8),         # int(v) bits are kept
    "Solarize": (0, 256),        # values from v on are inverted
    "Brightness": (0.05, 0.95),  # fraction of the image, the rest being black,
    "Contrast": (0.05, 0.95),    # or its mean grey,
    "Color": (0.05, 0.95),       # or its grey image,
    "Sharpness": (0.05, 0.95),   # or its smoothed image
    "AutoContrast": (0, 1),
    "Equalize": (0, 1),
}
OPERATIONS = tuple(RANGES)


def apply(images: Tensor, operations: np.ndarray, magnitudes: np.ndarray) -> Tensor:
    """Apply to image i the operations OPERATIONS[operations[i, 0]], then OPERATIONS[operations[i, 1]], and so on.

    images: uint8 [N, C, H, W]. operations: integers [N, K]. magnitudes: float64 [N, K], within RANGES.
    Returns uint8 [N, C, H, W], a new tensor. Compiled for a GPU, blends may round one byte in a million differently.
    """
    if is_compiled(images):
        return _apply_compiled(images, operations, magnitudes)
    place = np.arange(len(images))  # images[i] is number place[i] of the given batch
    for chosen, v in zip(operations.T, magnitudes.T, strict=True):
        order = np.argsort(chosen[place], kind="stable")
        place = place[order]
        images = images.index_select(0, to_device(order, images.device))
        apply_sorted(images, chosen[place], v[place])
    return images.index_select(0, to_device(np.argsort(place), images.device))


def apply_sorted(images: Tensor, operations: np.ndarray, v: np.ndarray) -> None:
    """Apply one operation an image, in place. operations: integers [N], ascending. v: their magnitudes [N]."""
    starts = np.searchsorted(operations, np.arange(len(OPERATIONS) + 1))

    def update(first: str, last: str, function: Callable, parameters: Callable[[slice], np.ndarray] | None) -> None:
        here = slice(starts[OPERATIONS.index(first)], starts[OPERATIONS.index(last) + 1])
        if here.start < here.stop:
            given = () if parameters is None else (to_device(parameters(here), images.device),)
            images[here] = function(images[here], *given)

    names, (height, width) = np.array(OPERATIONS), images.shape[2:]
    update("Rotate", "TranslateY", affine, lambda here: fixed_point(names[operations[here]], v[here], height, width))
    update("Posterize", "Posterize", posterize, lambda here: v[here].astype(np.int64))
    update("Solarize", "Solarize", solarize, lambda here: np.ceil(v[here]).astype(np.int16))
    for name, function in (("Brightness", brightness), ("Contrast", contrast), ("Color", color),
                           ("Sharpness", sharpness)):
        update(name, name, function, lambda here: v[here].astype(np.float32))
    update("AutoContrast", "AutoContrast", autocontrast, None)
    update("Equalize", "Equalize", equalize, None)


def per_image(parameter: Tensor) -> Tensor:
    return parameter.reshape(-1, 1, 1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Geometry

def fixed_point(names: np.ndarray, v: np.ndarray, height: int | np.ndarray, width: int | np.ndarray) -> np.ndarray:
    """Return where the geometric operations sample their input, as int32 [N, 6]: (A, B, C, D, E, F) of N images.

    Output pixel (x, y) takes input pixel ((A x + B y + C) >> 16, (D x + E y + F) >> 16).
    """
    height, width = np.broadcast_to(height, v.shape), np.broadcast_to(width, v.shape)
    # Input position (a x + b y + c, d x + e y + f) of the output position (x, y), both in pixels, centres at .5.
    a, e = np.ones((2, len(v)))
    b, d = np.zeros((2, len(v)))
    rotate = names == "Rotate"
    turn = -np.radians(v[rotate])
    a[rotate] = e[rotate] = np.cos(turn)
    b[rotate], d[rotate] = np.sin(turn), -np.sin(turn)
    c = np.where(rotate, a * (-width / 2) + b * (-height / 2) + width / 2, 0.0)  # the centre stays where it is
    f = np.where(rotate, d * (-width / 2) + e * (-height / 2) + height / 2, 0.0)
    b[names == "ShearX"] = v[names == "ShearX"]
    d[names == "ShearY"] = v[names == "ShearY"]

    def nearest(x: np.ndarray) -> np.ndarray:
        return np.trunc(x * 65536 + np.where(x >= 0, 0.5, -0.5))

    coefficients = nearest(np.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5], axis=1))
    # Pillow moves an image by whole pixels without rounding the shift to 1/65536 first.
    for name, column, shift in ("TranslateX", 2, width), ("TranslateY", 5, height):
        moved = names == name
        coefficients[moved, column] = np.floor(v[moved] * shift[moved] + 0.5) * 65536
    return coefficients.astype(np.int32)


def affine(images: Tensor, coefficients: Tensor, area: Area | None = None) -> Tensor:
    """Sample every image where its six integers (see fixed_point) say; black outside the image."""
    channels, height, width = images.shape[1:]
    bottom, right = (height, width) if area is None else (area.height, area.width)
    a, b, c, d, e, f = coefficients.reshape(-1, 6, 1, 1).unbind(1)
    y = torch.arange(height, dtype=torch.int32, device=images.device).reshape(1, -1, 1)
    x = torch.arange(width, dtype=torch.int32, device=images.device).reshape(1, 1, -1)
    column = (a * x + (b * y + c)) >> 16
    row = (d * x + (e * y + f)) >> 16
    inside = (column >= 0) & (column < right) & (row >= 0) & (row < bottom)
    source = (row * width + column).mul_(inside).to(torch.int64).flatten(1).unsqueeze(1)
    sampled = images.flatten(2).gather(2, source.expand(-1, channels, -1))
    return sampled.reshape(images.shape).mul_(inside.unsqueeze(1))


# ----------------------------------------------------------------------------------------------------------------------
# Levels

def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` (integers [N], 0..8) of every value."""
    return images & per_image((256 - 2 ** (8 - bits)).to(torch.uint8))


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values from `threshold` (integers [N], 0..256) on."""
    return images ^ (255 * (images >= per_image(threshold)).to(torch.uint8))


def autocontrast(images: Tensor, area: Area | None = None) -> Tensor:
    """Stretch every channel to 0..255; a channel of one value stays."""
    darkest = images if area is None else torch.where(area.inside, images, 255)
    brightest = images if area is None else torch.where(area.inside, images, 0)
    low, high = darkest.amin((2, 3)).double(), brightest.amax((2, 3)).double()
    # Tensor / tensor: number / tensor multiplies by a rounded reciprocal, which gives another table in 11 % of cases.
    scale = (torch.full_like(low, 255) / (high - low)).unsqueeze(2)
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    stretched = level * scale + (-low.unsqueeze(2) * scale)
    table = torch.where((high > low).unsqueeze(2), stretched, level).clamp(0, 255).to(torch.uint8)
    return look_up(images, table)


def equalize(images: Tensor, area: Area | None = None) -> Tensor:
    """Flatten every channel's histogram."""
    values = images.flatten(2).to(torch.int64)
    histogram = values.new_zeros((*values.shape[:2], 256))
    counted = torch.ones_like(values) if area is None else area.inside.expand_as(images).flatten(2).to(torch.int64)
    histogram.scatter_add_(2, values, counted)
    shown = images if area is None else torch.where(area.inside, images, 0)
    brightest = shown.amax((2, 3)).to(torch.int64).unsqueeze(2)
    pixels = values.shape[2] if area is None else (area.height * area.width).to(torch.int64)
    step = (pixels - histogram.gather(2, brightest)) // 255
    below = histogram.cumsum(2) - histogram
    level = torch.arange(256, device=images.device)
    flat = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, flat, level).to(torch.uint8)  # the step is 0 for one level alone, too
    return look_up(images, table)


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace every value by its entry in the table, uint8 [N, C, 256], of its image and channel."""
    return table.gather(2, images.flatten(2).to(torch.int64)).reshape(images.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Blends: float32, in separate steps: a fused multiply-add rounds one byte in a million differently

def blend(degenerate: Tensor, images: Tensor, fraction: Tensor) -> Tensor:
    """Return trunc(d + fraction (x - d)) of images x and degenerates d, which broadcast; fraction: float32 [N]."""
    degenerate = degenerate.float()
    return (images.float() - degenerate).mul_(per_image(fraction)).add_(degenerate).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Return the luma, int32 [N, 1, H, W] in 0..255, rounded as Pillow does."""
    if images.shape[1] == 1:
        return images.to(torch.int32)
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def brightness(images: Tensor, fraction: Tensor) -> Tensor:
    return images.float().mul_(per_image(fraction)).to(torch.uint8)


def contrast(images: Tensor, fraction: Tensor, area: Area | None = None) -> Tensor:
    pixels = images.shape[2] * images.shape[3] if area is None else (area.height * area.width).unsqueeze(3).long()
    level = grey(images) if area is None else grey(images) * area.inside
    total = level.sum((1, 2, 3), keepdim=True)
    return blend((2 * total + pixels) // (2 * pixels), images, fraction)  # the mean, halves upward


def color(images: Tensor, fraction: Tensor) -> Tensor:
    return blend(grey(images), images, fraction)


def sharpness(images: Tensor, fraction: Tensor, area: Area | None = None) -> Tensor:
    return blend(smooth(images) if area is None else torch.where(area.within, smooth(images), images), images, fraction)


def smooth(images: Tensor) -> Tensor:
    """Average 3x3 neighbourhoods, the centre five times, rounded to nearest; the outermost pixels stay."""
    smoothed = images.clone()
    wide = images.to(torch.int16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    smoothed[:, :, 1:-1, 1:-1] = (total + 6) // 13
    return smoothed


# ----------------------------------------------------------------------------------------------------------------------
# On GPUs

GEOMETRIC = OPERATIONS[OPERATIONS.index("Rotate"):OPERATIONS.index("TranslateY") + 1]


@dataclass(frozen=True)
class Area:
    """The upper left part of a canvas that is the image, of N images of different sizes on canvases of [H, W].

    height, width: int32 [N, 1, 1]. inside, within: bool [N, 1, H, W], of the image, and without its outermost pixels.
    """

    height: Tensor
    width: Tensor
    inside: Tensor
    within: Tensor

    @classmethod
    def of(cls, heights: np.ndarray, widths: np.ndarray, device: torch.device) -> Area:
        def marked(first: int, sizes: np.ndarray) -> np.ndarray:
            places = np.arange(sizes.max())
            return (places >= first) & (places < sizes[:, None] - first)

        masks = [to_device(marked(first, heights), device)[:, None, :, None]
                 & to_device(marked(first, widths), device)[:, None, None, :] for first in (0, 1)]
        sizes = (to_device(size.astype(np.int32), device)[:, None, None] for size in (heights, widths))
        return cls(*sizes, *masks)


def pack(operations: np.ndarray, magnitudes: np.ndarray, height: int | np.ndarray, width: int | np.ndarray
         ) -> np.ndarray:
    """Return float64 [K, N, 8], the same for `layer`: operation, six integers of `affine`, value that others take.

    height, width: of all images, or of each, [N].
    """
    names, v = np.array(OPERATIONS)[operations.T], magnitudes.T
    packed = np.zeros((*names.shape, 8))
    packed[..., 0] = operations.T
    packed[..., [1, 5]] = 1 << 16  # each pixel stays where it is
    geometric = np.isin(names, GEOMETRIC)
    height, width = (np.broadcast_to(side, names.shape)[geometric] for side in (height, width))
    packed[geometric, 1:7] = fixed_point(names[geometric], v[geometric], height, width)
    packed[..., 7] = np.where(names == "Solarize", np.ceil(v),
                              np.where(names == "Posterize", np.trunc(v), v.astype(np.float32)))
    return packed


def layer(images: Tensor, packed: Tensor, area: Area | None = None) -> Tensor:
    """Apply one operation an image: uint8 [N, C, H, W], and [N, 8] of `pack`. area: None for whole canvases."""
    chosen, value = packed[:, 0].to(torch.int32), packed[:, 7]
    fraction = value.to(torch.float32)
    bits = torch.where(chosen == OPERATIONS.index("Posterize"), value, 8).to(torch.int64)
    others = {"Posterize": posterize(images, bits), "Solarize": solarize(images, value.to(torch.int16)),
              "Brightness": brightness(images, fraction), "Contrast": contrast(images, fraction, area),
              "Color": color(images, fraction), "Sharpness": sharpness(images, fraction, area),
              "AutoContrast": autocontrast(images, area), "Equalize": equalize(images, area)}
    result = affine(images, packed[:, 1:7].to(torch.int32), area)
    for name, other in others.items():
        result = torch.where(per_image(chosen == OPERATIONS.index(name)), other, result)
    return result


def is_compiled(images: Tensor) -> bool:
    """Return whether `apply` compiles for these images: not for single photographs, whose sizes are all different."""
    strict = torch.are_deterministic_algorithms_enabled()
    return images.is_cuda and len(images) > 1 and not strict and can_compile()


@cache
def compiled_layer() -> Callable[..., Tensor]:
    """Return `layer`, compiled; torch.compile imports the compiler, which most programs do not need."""
    return torch.compile(layer)


def _apply_compiled(images: Tensor, operations: np.ndarray, magnitudes: np.ndarray) -> Tensor:
    for packed in to_device(pack(operations, magnitudes, *images.shape[2:]), images.device):
        images = compiled_layer()(images, packed)
    return images


def apply_on_canvas(images: Tensor, sizes: np.ndarray, operations: np.ndarray, magnitudes: np.ndarray) -> Tensor:
    """Do as `apply` for images of different `sizes` [N, 2], the upper left parts of uint8 [N, C, H, W], together.

    Pixels outside are ignored. For GPUs; a CPU is faster one by one. Not compiled, since every set of sizes would
    compile anew.
    """
    heights, widths = sizes.T
    area = Area.of(heights, widths, images.device)
    for packed in to_device(pack(operations, magnitudes, heights, widths), images.device):
        images = layer(images, packed, area)
    return images
