"""The images of records: decoded as a check, cropped, resized, encoded again.

All of it on the CPU with Pillow, in the processes of `packing`.
"""
from __future__ import annotations

import io
import os
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from PIL import Image

from shared.cli import UserError
from shared.data.images import load_image, open_image

AS_IT_IS = ("L", "RGB", "LA", "RGBA")  # modes that --color -1 keeps


def payloads(paths: Sequence[str], options: SimpleNamespace) -> list[bytes | UserError]:
    """Return for each path below the root the bytes to store, or the reason for none."""
    return [payload(os.path.join(options.root, path), options) for path in paths]


def payload(path: str, options: SimpleNamespace) -> bytes | UserError:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        return UserError(f"{path} cannot be read ({error.strerror})")
    if options.pass_through and not options.verify:
        return data
    try:
        image = None if options.color >= 0 else load_image(data, path)
        if image is None or image.mode not in AS_IT_IS:
            image = open_image(data, path)
    except UserError as error:
        return error
    return data if options.pass_through else encode(transform(image, options), options)


def transform(image: Image.Image, options: SimpleNamespace) -> Image.Image:
    """Return the image to store: gray or RGB, its central square, its shorter side resized."""
    if options.color >= 0:
        image = image.convert("RGB" if options.color else "L")
    elif image.mode not in ("L", "RGB") and options.encoding == ".jpg":
        image = image.convert("RGB")
    if options.center_crop:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if options.resize:
        width, height = image.size
        size = (options.resize, height * options.resize // width) if height > width else (
            width * options.resize // height, options.resize)
        image = Image.fromarray(resize_bilinear(np.asarray(image), *size))
    return image


def resize_bilinear(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8 [H, W(, C)] by bilinear interpolation between the four nearest pixels, as OpenCV does by default.

    Nothing is smoothed before pixels are dropped, unlike Pillow's resize.
    """
    def neighbours(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = ((np.arange(wanted) + 0.5) * (size / wanted) - 0.5).clip(0, size - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)

    top, bottom, down = neighbours(pixels.shape[0], height)
    left, right, across = neighbours(pixels.shape[1], width)
    down = down.reshape(-1, *[1] * (pixels.ndim - 1))
    across = across.reshape(-1, *[1] * (pixels.ndim - 2))
    rows = pixels[top] * (1 - down) + pixels[bottom] * down
    return np.rint(rows[:, left] * (1 - across) + rows[:, right] * across).astype(np.uint8)


def encode(image: Image.Image, options: SimpleNamespace) -> bytes:
    stream = io.BytesIO()
    if options.encoding == ".png":
        image.save(stream, "PNG", compress_level=min(options.quality, 9))
    else:
        image.save(stream, "JPEG", quality=options.quality)
    return stream.getvalue()
