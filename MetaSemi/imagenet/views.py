"""Views of photographs on ImageNet: a random part for training, the centre for evaluation; and passes over them."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

ATTEMPTS = 100


@dataclass(frozen=True)
class Crops:
    """Parameters of N random views.

    areas: fractions of the image, and aspects: width over height, float64 [N, attempts]. place: float64 [N, 2],
    where in the room left (top, left; 0..1). flip: bool [N].
    """

    areas: np.ndarray
    aspects: np.ndarray
    place: np.ndarray
    flip: np.ndarray

    def __getitem__(self, part: slice | np.ndarray) -> Crops:
        return Crops(self.areas[part], self.aspects[part], self.place[part], self.flip[part])

    def window(self, number: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of the part of image `number`: the first attempt that fits into it.

        If none fits, the largest central part with the aspect of the first attempt.
        """
        area = self.areas[number] * (height * width)
        widths = np.rint(np.sqrt(area * self.aspects[number])).astype(int).clip(min=1)
        heights = np.rint(np.sqrt(area / self.aspects[number])).astype(int).clip(min=1)
        fits = np.flatnonzero((widths <= width) & (heights <= height))
        if len(fits):
            tall, wide = int(heights[fits[0]]), int(widths[fits[0]])
            top, left = (self.place[number] * (height - tall + 1, width - wide + 1)).astype(int).tolist()
            return top, left, tall, wide
        aspect = self.aspects[number, 0]
        wide, tall = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
        return (height - tall) // 2, (width - wide) // 2, tall, wide


@dataclass(frozen=True)
class RandomCrop:
    """A training view: a random part of the image, resized to a square, mirrored or not.

    size: side of the square in pixels. area: bounds of the part's fraction of the image. aspect: bounds of its width
    over its height.
    """

    size: int = 224
    area: tuple[float, float] = (0.1, 1.0)
    aspect: tuple[float, float] = (0.8, 1.25)
    side = None

    def draw(self, n: int, rng: np.random.Generator) -> Crops:
        """Draw n views: the area uniform, the aspect log-uniform, the place uniform, flip 1/2."""
        low, high = np.log(self.aspect)
        return Crops(rng.uniform(*self.area, (n, ATTEMPTS)), np.exp(rng.uniform(low, high, (n, ATTEMPTS))),
                     rng.random((n, 2)), rng.random(n) < 0.5)

    def __call__(self, image: Image.Image, crops: Crops, number: int) -> np.ndarray:
        """Return uint8 [size, size, 3] of an RGB image, by the parameters at `number`."""
        top, left, height, width = crops.window(number, image.height, image.width)
        part = image.crop((left, top, left + width, top + height))
        pixels = resize(np.asarray(part), self.size, self.size)
        return pixels[:, ::-1] if crops.flip[number] else pixels


@dataclass(frozen=True)
class CentreCrop:
    """The evaluation view: the shorter side resized to `side`, then the central square of `size` pixels."""

    size: int = 224
    side: int = 256

    def __call__(self, image: Image.Image, crops: None = None, number: int = 0) -> np.ndarray:
        """Return uint8 [size, size, 3] of an RGB image."""
        shorter = min(image.size)
        # Both axes get exactly the scale of the shorter one, although the longer side is rounded to whole pixels.
        height, width = (int(np.floor(side * self.side / shorter + 0.5)) for side in (image.height, image.width))
        pixels = resize(np.asarray(image), height, width, shorter / self.side)
        top, left = (int(np.floor((side - self.size) / 2 + 0.5)) for side in (height, width))
        return pixels[top:top + self.size, left:left + self.size]


def resize(pixels: np.ndarray, height: int, width: int, scale: float | None = None) -> np.ndarray:
    """Resize uint8 [H, W, 3] by a triangular filter that widens when the image shrinks; the edge goes on outside.

    So does DALI, with the same result within one grey level; Pillow alone cuts the filter off at the edge. scale: input
    pixels per output pixel on both axes, about the centre (default: those of the whole image).
    """
    sizes = pixels.shape[:2]
    scales = [have / want if scale is None else scale for have, want in zip(sizes, (height, width), strict=True)]
    pads = [int(np.ceil(max(one, 1.0))) + 1 for one in scales]
    padded = np.pad(pixels, (*((pad, pad) for pad in pads), (0, 0)), "edge")
    (top, left), (bottom, right) = zip(*(
        (pad + (have - want * one) / 2, pad + (have + want * one) / 2)
        for pad, have, want, one in zip(pads, sizes, (height, width), scales, strict=True)), strict=True)
    return np.asarray(Image.fromarray(padded).resize((width, height), Image.Resampling.BILINEAR,
                                                     box=(left, top, right, bottom)))


class Epochs:
    """Shuffled passes over N photographs in batches of the same size, as a function of (seed, step).

    The last batch of a pass is filled from its beginning. `length`: steps in a pass.
    """

    def __init__(self, count: int, batch: int, rng: Callable[[int, str], np.random.Generator], purpose: str) -> None:
        self.count, self.batch, self.rng, self.purpose = count, batch, rng, purpose
        self.length = -(-count // batch)
        self._order: tuple[int, np.ndarray] | None = None

    def __call__(self, step: int) -> np.ndarray:
        """Return the positions of a step, int64 [batch]."""
        epoch, place = divmod(step, self.length)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.rng(epoch, self.purpose).permutation(self.count))
        places = np.arange(place * self.batch, (place + 1) * self.batch) % self.count
        return self._order[1][places]
