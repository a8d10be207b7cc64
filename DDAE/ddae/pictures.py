"""Images from numbers: pixel values, and sheets of many images."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from shared.data.pngs import write_png
from shared.training.files import make_dir

PADDING = 2  # black pixels around the images of a sheet


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return pixel values uint8 of numbers in [0, 1] (others are clamped): rounded, halves up."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def sheet(images: torch.Tensor, per_row: int) -> torch.Tensor:
    """Arrange images [N, C, H, W] in rows on black: [C, rows·(H + 2) + 2, columns·(W + 2) + 2]; one image stays as it
    is."""
    count, channels, height, width = images.shape
    if count == 1:
        return images[0]
    columns = min(per_row, count)
    rows = -(-count // columns)
    out = images.new_zeros(channels, rows * (height + PADDING) + PADDING, columns * (width + PADDING) + PADDING)
    for number, image in enumerate(images):
        top, left = (PADDING + place * (size + PADDING) for place, size in
                     zip(divmod(number, columns), (height, width), strict=True))
        out[:, top:top + height, left:left + width] = image
    return out


def write_sheet(path: Path, images: torch.Tensor, per_row: int) -> None:
    """Write images [N, 1 or 3, H, W], numbers in [0, 1] or uint8, as one PNG. The folder is made if needed."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    make_dir(path.parent)
    write_png(path, np.asarray(sheet(pixels, per_row).cpu()))
