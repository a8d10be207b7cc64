"""Pixel values of written images, sheets, and the enlargement ahead of the VAE."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from DDAE.ddae.sampling import sheet, to_uint8
from DDAE.DiT.vae_preprocessing import prepared
from shared.data.images import ImageSet
from tests.golden.cases import each, serves, whole
from tests.golden.ddae_compare import assert_close, cases_of, tensors

PIXELS, ENLARGED = cases_of("pixels"), cases_of("enlargement")
SERVES = serves(PIXELS, ENLARGED)


@each(PIXELS)
def test_pixel_values_and_sheet(case) -> None:
    stored = tensors(case)
    if "png_uint8" in stored:
        assert_close(to_uint8(stored["image"])[0].permute(1, 2, 0), stored["png_uint8"], case["tolerance"])
    if "grid_uint8" in stored:
        made = sheet(stored["grid_images_f64"], whole(case["what"], "# per row"))
        assert_close(to_uint8(made).permute(1, 2, 0), stored["grid_uint8"], case["tolerance"])


@each(ENLARGED)
def test_enlargement(case) -> None:
    stored = tensors(case)
    side, stride = whole(case["what"], r"to # \(short side"), whole(case["what"], r"every #(?:st|nd|rd|th) pixel")
    start = whole(case["what"], "pixel from #")
    # A difference of one grey level, whatever float32 makes of it.
    allowed = str(1.01 / whole(case["tolerance"], "1/#"))
    pixels = stored["img_uint8"].permute(2, 0, 1)[None].numpy()
    images = ImageSet(np.ascontiguousarray(pixels), np.zeros(1, np.int64), ("0",), "golden")
    options = SimpleNamespace(resolution=side, seed=0)
    out = prepared(images, np.array([0]), "test", 0, options, torch.device("cpu"))[0]
    assert_close(out[:, start::stride, start::stride], stored["out_strided"], allowed)
    if "channel_means" in stored:
        assert_close(out.mean((1, 2)), stored["channel_means"], allowed)
