"""The published views of an image, for whole batches on the device: draws on the host, then their application.

    weak     flip, crop with padding, resize, normalise
    strong   flip, crop, RandAugment with cutout, resize, normalise; "strong_resized": the resize before RandAugment
    eval     resize, normalise

The order matters only for images that are resized (STL-10: 96 to 32).
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from shared.augment.randaugment import OPERATIONS
from shared.augment.views import StrongDraws, WeakDraws, WeakPolicy, draw_weak, normalise, shift_whole, strong
from shared.data.pool import resize

OPS_PER_IMAGE, LEVELS = 2, 10
CUTOUT_SIDE = 16
GREY = 127
# The order in which the published code lists its operations.
ALPHABETICAL = tuple(sorted(OPERATIONS))
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def magnitude(operation: str, level: int, negative: bool, size: tuple[int, int]) -> float:
    """Return the magnitude, in the units of shared/augment/randaugment.py, of an operation at a level 1..9.

    negative: turn, shear or shift the other way. size: (height, width) in pixels.
    """
    sign = -1 if negative and operation in SIGNED else 1
    if operation == "Rotate":
        return sign * int(30 * level / LEVELS)
    if operation in ("ShearX", "ShearY"):
        return sign * 0.3 * level / LEVELS
    if operation in ("TranslateX", "TranslateY"):
        side = size[1] if operation == "TranslateX" else size[0]
        return int(sign * 0.3 * level / LEVELS * side) / side
    if operation == "Posterize":
        return int(4 * level / LEVELS) + 4
    if operation == "Solarize":
        return 256 - int(256 * level / LEVELS)
    if operation in ("Brightness", "Color", "Contrast", "Sharpness"):
        return 0.9 * level / LEVELS + 0.05
    return 0.0


def strong_draws(operations: np.ndarray, applied: np.ndarray, levels: np.ndarray, negative: np.ndarray,
                 centre: np.ndarray, size: tuple[int, int], cutout_side: int = CUTOUT_SIDE) -> StrongDraws:
    """Return the parameters of n strong augmentations.

    operations: positions in ALPHABETICAL, [n, K]; applied: whether each is, [n, K]; levels: 1..9; negative: the sign;
    centre: of the cutout, (x, y) in pixels, [n, 2].
    """
    places = np.array([OPERATIONS.index(name) for name in ALPHABETICAL])
    table = np.array([[[magnitude(name, level, sign, size) for sign in (False, True)] for level in range(LEVELS)]
                      for name in ALPHABETICAL])
    magnitudes = table[operations, levels, negative.astype(int)]
    chosen = np.where(applied, places[operations], OPERATIONS.index("Identity"))
    fraction = np.full(len(operations), cutout_side / size[1])
    return StrongDraws(chosen, np.where(applied, magnitudes, 0.0), fraction, centre)


def draw_strong(n: int, rng: np.random.Generator, size: tuple[int, int], cutout_side: int = CUTOUT_SIDE) -> StrongDraws:
    """Draw n strong augmentations of images of `size`.

    Two operations, each applied with probability 1/2, at a level 1..9, then a cutout.
    """
    operations = rng.integers(len(ALPHABETICAL), size=(n, OPS_PER_IMAGE))
    applied, negative = rng.random((n, OPS_PER_IMAGE)) <= 0.5, rng.random((n, OPS_PER_IMAGE)) < 0.5
    levels = rng.integers(1, LEVELS, size=(n, OPS_PER_IMAGE))
    centre = rng.random((n, 2)) * (size[1], size[0])
    return strong_draws(operations, applied, levels, negative, centre, size, cutout_side)


@dataclass(frozen=True)
class Look:
    """How the images of a data set are seen.

    mean, std: of each channel, on the scale 0..1. side: of the images that networks get. cutout_side: in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int
    policy: WeakPolicy = WeakPolicy()
    cutout_side: int = CUTOUT_SIDE

    def draw(self, kind: str, n: int, rng: np.random.Generator,
             size: tuple[int, int]) -> tuple[WeakDraws | None, StrongDraws | None]:
        """Return the draws of `view` for n images of `size`."""
        if kind == "eval":
            return None, None
        weak_draws = draw_weak(n, rng, size, self.policy)
        if kind == "weak":
            return weak_draws, None
        seen = (self.side, self.side) if kind == "strong_resized" else weak_draws.window
        return weak_draws, draw_strong(n, rng, seen, self.cutout_side)

    def view(self, images: Tensor, kind: str, weak_draws: WeakDraws | None, strong_: StrongDraws | None) -> Tensor:
        """Return one view of uint8 images [n, C, H, W]: float32 [n, C, side, side]."""
        if kind != "eval":
            images = shift_whole(images, weak_draws)
        elif self.policy.crop is not None:
            images = centre_crop(images, self.policy.crop)
        if kind == "strong_resized":
            images = self.resize(images)
        if kind.startswith("strong"):
            images = strong(images, strong_, (GREY,) * images.shape[1])
        return normalise(self.resize(images), self.mean, self.std)

    def resize(self, images: Tensor) -> Tensor:
        """Resize uint8 [n, C, H, W] to squares as Pillow's bilinear filter does; images of that size stay."""
        return images if images.shape[2:] == (self.side, self.side) else resize(images, self.side)


def centre_crop(images: Tensor, side: int) -> Tensor:
    """Return the middle of images [n, C, H, W]: [n, C, side, side]."""
    top, left = (images.shape[2] - side) // 2, (images.shape[3] - side) // 2
    return images[:, :, top:top + side, left:left + side]
