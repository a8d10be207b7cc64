"""Pixel values of written images, sheets, and the enlargement ahead of the VAE."""
from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import torch

from DDAE.ddae.sampling import sheet, to_uint8
from DDAE.DiT.vae_preprocessing import prepared
from shared.data.images import ImageSet
from tests.golden.ddae_compare import assert_close, cases, served, tensors

ALL = cases("data.npz")
CASES = served(ALL)


def test_pixel_values_and_sheet() -> None:
    for case in (case for case in ALL if "grid_uint8" in case["keys"]):
        stored = tensors(case)
        ours = to_uint8(stored["image"])[0].permute(1, 2, 0)
        assert_close(ours, stored["png_uint8"], case["tolerance"])
        images = stored["grid_images_f64"]
        per_row = int(re.search(r"(\d+) per row", case["what"])[1])
        assert_close(to_uint8(sheet(images, per_row)).permute(1, 2, 0), stored["grid_uint8"], case["tolerance"])


def test_enlargement() -> None:
    for case in (case for case in ALL if "out_strided" in case["keys"]):
        stored = tensors(case)
        side, stride, start = (int(re.search(pattern, case["id"] + case["what"])[1])
                               for pattern in (r"resize(\d+)", r"every (\d+)th pixel", r"pixel from (\d+)"))
        # A difference of one grey level, whatever float32 makes of it.
        levels = int(re.search(r"1/(\d+)", case["tolerance"])[1])
        allowed = str(1.01 / levels)
        pixels = stored["img_uint8"].permute(2, 0, 1)[None].numpy()
        images = ImageSet(np.ascontiguousarray(pixels), np.zeros(1, np.int64), ("0",), "golden")
        options = SimpleNamespace(resolution=side, seed=0)
        out = prepared(images, np.array([0]), "test", 0, options, torch.device("cpu"))[0]
        assert_close(out[:, start::stride, start::stride], stored["out_strided"], allowed)
        assert_close(out.mean((1, 2)), stored["channel_means"], allowed)


def test_every_case_of_the_file_has_a_test() -> None:
    assert [case["id"] for case in ALL if not {"grid_uint8", "out_strided"} & set(case["keys"])] == []
