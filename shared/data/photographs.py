"""Photographs that do not fit in memory: read by position from record files or folders, cropped and resized by Pillow.

A photograph that cannot be read or decoded ends in a UserError that names it; with `skip_bad` the next good one stands
in for it, the same at every pass, and `bad` counts it.
"""
from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from MetaSemi.imagenet.records import RecordFile
from shared.cli import UserError
from shared.data.image_files import open_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB, unit scale
ATTEMPTS = 100


class Files(Protocol):
    """Encoded images by position, each with a label."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str: ...

    def get(self, position: int) -> tuple[bytes, float]: ...


class RecordImages:
    """The images of a record file; of several labels the first."""

    def __init__(self, path: str | os.PathLike, skip_bad: bool = False) -> None:
        self.file = RecordFile(path, skip_bad)

    def __len__(self) -> int:
        return len(self.file)

    def name(self, position: int) -> str:
        return self.file.name(position)

    def get(self, position: int) -> tuple[bytes, float]:
        record = self.file.read(position)
        return record.payload, record.labels[0] if record.labels else -1.0


class FolderImages:
    """Image files below a folder. paths: relative to it; labels: int64 [N]."""

    def __init__(self, folder: Path, paths: Sequence[str], labels: np.ndarray) -> None:
        self.folder, self.paths, self.labels = folder, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        return str(self.folder / self.paths[position])

    def get(self, position: int) -> tuple[bytes, float]:
        try:
            return (self.folder / self.paths[position]).read_bytes(), float(self.labels[position])
        except OSError as error:
            raise UserError(f"{self.name(position)}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Photograph:
    """An encoded image, its label and its position. stands_in: for one that cannot be read."""

    payload: bytes
    label: int
    position: int
    stands_in: bool = False


class Photographs:
    """Photographs by position, each with a label in 0..num_classes-1.

    `bad`: position -> why it cannot be used; filled as they are met, with skip_bad. Safe to be read by many threads.
    """

    def __init__(self, files: Files, num_classes: int, skip_bad: bool = False) -> None:
        self.files, self.num_classes, self.skip_bad = files, num_classes, skip_bad
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.files)

    def fetch(self, position: int) -> Photograph:
        """Return the photograph at a position, or the next good one in its place; UserError."""
        for offset in range(len(self)):
            here = (position + offset) % len(self)
            if here in self.bad:
                continue
            try:
                payload, label = self.files.get(here)
                if label != int(label) or not 0 <= label < self.num_classes:
                    raise UserError(f"{self.files.name(here)} has the label {label:g}; expected a class from 0 to "
                                    f"{self.num_classes - 1}")
                return Photograph(payload, int(label), here, offset > 0)
            except UserError as error:
                self.mark_bad(here, str(error))
        raise UserError(f"{self.files.name(position)}: none of {len(self)} photographs can be used")

    def decode(self, position: int) -> tuple[Image.Image, Photograph]:
        """Return the photograph at a position as RGB, or the next good one in its place; UserError."""
        while True:
            photograph = self.fetch(position)
            try:
                image = open_image(photograph.payload, self.files.name(photograph.position))
                return image if image.mode == "RGB" else image.convert("RGB"), photograph
            except UserError as error:
                self.mark_bad(photograph.position, str(error))

    def checked(self, position: int) -> Photograph:
        """Return as `fetch` does, but only what looks whole, or can be decoded where it does not; UserError."""
        while True:
            photograph = self.fetch(position)
            if looks_whole(photograph.payload):
                return photograph
            try:
                open_image(photograph.payload, self.files.name(photograph.position))
                return photograph
            except UserError as error:
                self.mark_bad(photograph.position, str(error))

    def mark_bad(self, position: int, reason: str) -> None:
        """Never use a photograph again; UserError, unless bad ones are to be skipped."""
        if not self.skip_bad:
            raise UserError(f"{reason}; leave such ones out with --skip-bad")
        if self.bad.setdefault(position, reason) is reason:
            print(f"warning: {reason}; left out", file=sys.stderr, flush=True)


def looks_whole(payload: bytes) -> bool:
    """Whether bytes begin and end as a JPEG or PNG file does."""
    if payload.startswith(b"\xff\xd8\xff"):
        return payload.endswith(b"\xff\xd9")
    return payload.startswith(b"\x89PNG\r\n\x1a\n") and payload.endswith(b"IEND\xaeB`\x82")


def image_size(payload: bytes) -> tuple[int, int]:
    """Return (height, width) of an encoded image, from its head alone; (1, 1) where there is none to be read."""
    try:
        with Image.open(io.BytesIO(payload)) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 1, 1


# ------------------------------------------------------------------------------------------------------------- views

@dataclass(frozen=True)
class RandomCrop:
    """A training view: a random part of the image, resized to a square, mirrored or not.

    size: side of the square in pixels. area: bounds of the part's share of the image. aspect: bounds of its width over
    its height.
    """

    size: int = 224
    area: tuple[float, float] = (0.1, 1.0)
    aspect: tuple[float, float] = (0.8, 1.25)


@dataclass(frozen=True)
class CentreCrop:
    """The evaluation view: the shorter side resized to `side`, then the central square of `size` pixels."""

    size: int = 224
    side: int = 256


@dataclass(frozen=True)
class Crops:
    """Parameters of N random views. shares: of the area, and aspects: width over height, float64 [N, attempts].

    place: float64 [N, 2], where in the room left (top, left; 0..1). flip: bool [N].
    """

    shares: np.ndarray
    aspects: np.ndarray
    place: np.ndarray
    flip: np.ndarray

    def __getitem__(self, part: slice | np.ndarray) -> Crops:
        return Crops(self.shares[part], self.aspects[part], self.place[part], self.flip[part])

    def window(self, number: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of the part of image `number`: the first attempt that fits into it.

        Where none fits, the largest central part with an aspect of the first attempt.
        """
        area = self.shares[number] * (height * width)
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


def draw_crops(n: int, rng: np.random.Generator, view: RandomCrop) -> Crops:
    """Draw n random views: the share of the area uniform, the aspect log-uniform, the place uniform, flip 1/2."""
    low, high = np.log(view.aspect)
    return Crops(rng.uniform(*view.area, (n, ATTEMPTS)), np.exp(rng.uniform(low, high, (n, ATTEMPTS))),
                 rng.random((n, 2)), rng.random(n) < 0.5)


def random_view(image: Image.Image, view: RandomCrop, crops: Crops, number: int) -> np.ndarray:
    """Return uint8 [size, size, 3] of an RGB image, by the parameters at `number`."""
    top, left, height, width = crops.window(number, image.height, image.width)
    part = image.crop((left, top, left + width, top + height))
    pixels = resize(np.asarray(part), view.size, view.size)
    return pixels[:, ::-1] if crops.flip[number] else pixels


def central_view(image: Image.Image, view: CentreCrop) -> np.ndarray:
    """Return uint8 [size, size, 3] of an RGB image."""
    shorter = min(image.size)
    # Both axes get exactly the scale of the shorter one, although the longer side is rounded to whole pixels.
    height, width = (int(np.floor(side * view.side / shorter + 0.5)) for side in (image.height, image.width))
    pixels = resize(np.asarray(image), height, width, shorter / view.side)
    top, left = (int(np.floor((side - view.size) / 2 + 0.5)) for side in (height, width))
    return pixels[top:top + view.size, left:left + view.size]


def resize(pixels: np.ndarray, height: int, width: int, scale: float | None = None) -> np.ndarray:
    """Resize uint8 [H, W, 3] by a triangular filter that widens when the image shrinks; the edge goes on outside.

    So does DALI, with the same result within one grey level; Pillow alone cuts the filter off at the edge. scale: input
    pixels per output pixel on both axes, about the centre (default: so that the whole image is taken).
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
