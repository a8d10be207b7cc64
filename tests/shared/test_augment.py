"""Batched augmentation against Pillow itself, and the properties of its draws."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from shared.augment import randaugment
from shared.augment.randaugment import OPERATIONS, RANGES, apply
from shared.augment.views import (
    StrongDraws,
    WeakDraws,
    WeakPolicy,
    cutout,
    draw_strong,
    draw_weak,
    normalise,
    rotate_quarter_turns,
    strong,
    strong_photographs,
    weak,
)
from shared.cli import UserError
from shared.training.randomness import numpy_rng

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SIZES = [(32, 32), (96, 96), (24, 40), (33, 31)]


def in_pillow(image: Image.Image, operation: str, v: float) -> Image.Image:
    """The operation as the per-image pipelines do it."""
    width, height = image.size
    matrices = {"ShearX": (1, v, 0, 0, 1, 0), "ShearY": (1, 0, 0, v, 1, 0),
                "TranslateX": (1, 0, v * width, 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, v * height)}
    if operation in matrices:
        return image.transform(image.size, Image.Transform.AFFINE, matrices[operation])
    return {
        "Identity": lambda: image,
        "Rotate": lambda: image.rotate(v),
        "Posterize": lambda: ImageOps.posterize(image, int(v)),
        "Solarize": lambda: ImageOps.solarize(image, v),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(v),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(v),
        "Color": lambda: ImageEnhance.Color(image).enhance(v),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(v),
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
    }[operation]()


def to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def from_pillow(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def varied_images(n: int, channels: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise, low contrast, two levels, constants and smooth ramps in turn: uint8 [n, channels, *size]."""
    images = np.empty((n, channels, *size), np.uint8)
    y, x = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]), indexing="ij")
    for i in range(n):
        low, high = np.sort(rng.integers(0, 256, (2, channels, 1, 1)), axis=0)
        noise = rng.random((channels, *size))
        kind = i % 6
        images[i] = [
            np.floor(noise * 256),
            low + np.floor(noise * (high - low + 1)),
            np.where(noise < rng.random(), low, high),
            np.broadcast_to(low, noise.shape),
            low + (high - low) * (x * rng.random((channels, 1, 1)) + y) / 2,
            np.clip(low + rng.integers(1, 8) * np.floor(noise * 4), 0, 255),
        ][kind]
    return images


def compare(images: np.ndarray, operation: str, magnitudes: np.ndarray) -> None:
    chosen = np.full((len(images), 1), OPERATIONS.index(operation))
    ours = apply(torch.from_numpy(images), chosen, magnitudes[:, None]).numpy()
    for image, v, result in zip(images, magnitudes, ours, strict=True):
        wanted = from_pillow(in_pillow(to_pillow(image), operation, float(v)))
        np.testing.assert_array_equal(result, wanted, err_msg=f"{operation} {v!r}")


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_equals_pillow(operation: str, channels: int) -> None:
    rng = numpy_rng(0, channels, operation)
    for size in SIZES:
        images = varied_images(48, channels, size, rng)
        compare(images, operation, rng.uniform(*RANGES[operation], len(images)))


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_equals_pillow_on_thousands(operation: str) -> None:
    rng = numpy_rng(1, 0, operation)
    for size in SIZES:
        for channels in (3, 1):
            images = varied_images(1200, channels, size, rng)
            compare(images, operation, rng.uniform(*RANGES[operation], len(images)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_image_and_magnitude(data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(OPERATIONS))
    channels, height, width = data.draw(st.tuples(st.sampled_from([1, 3]), st.integers(3, 12), st.integers(3, 12)))
    values = data.draw(st.binary(min_size=channels * height * width, max_size=channels * height * width))
    v = data.draw(st.floats(*RANGES[operation]))
    compare(np.frombuffer(values, np.uint8).reshape(1, channels, height, width).copy(), operation, np.array([v]))


@pytest.mark.parametrize("operation", ["TranslateX", "TranslateY"])
@pytest.mark.parametrize("side", [32, 40, 96])
def test_translation_near_half_pixels(operation: str, side: int) -> None:
    # In 1/65536 of a pixel these would round the other way.
    halves = (np.arange(-8, 8) + 0.5) / side
    magnitudes = np.concatenate([halves + offset for offset in (-3e-6 / side, 0, 3e-6 / side)])
    compare(varied_images(len(magnitudes), 3, (side, side), numpy_rng(0, side, operation)), operation, magnitudes)


def test_autocontrast_on_every_pair_of_levels() -> None:
    # Every table of the operation: a channel holds two extremes and what lies between.
    pairs = np.array([(low, high) for low in range(256) for high in range(low, 256)])
    pairs = np.concatenate([pairs, pairs[: -len(pairs) % 3]])
    images = np.stack([np.linspace(low, high, 256).astype(np.uint8) for low, high in pairs]).reshape(-1, 3, 16, 16)
    compare(images, "AutoContrast", np.zeros(len(images)))


def test_operations_follow_one_another() -> None:
    rng = numpy_rng(0, 0, "sequence")
    images = varied_images(120, 3, (32, 32), rng)
    draws = draw_strong(120, rng, (32, 32))
    ours = strong(torch.from_numpy(images), draws).numpy()
    for i, image in enumerate(images):
        picture = to_pillow(image)
        for chosen, v in zip(draws.operations[i], draws.magnitudes[i], strict=True):
            picture = in_pillow(picture, OPERATIONS[chosen], float(v))
        side = draws.cutout_fraction[i] * 32
        x0, y0 = (int(max(0, centre - side / 2)) for centre in draws.cutout_centre[i])
        corners = (x0, y0, int(min(32, x0 + side)), int(min(32, y0 + side)))
        ImageDraw.Draw(picture).rectangle(corners, (125, 123, 114))
        np.testing.assert_array_equal(ours[i], from_pillow(picture))


def test_input_is_left_alone() -> None:
    images = torch.from_numpy(varied_images(60, 3, (32, 32), numpy_rng(0, 0, "input")))
    before = images.clone()
    strong(images, draw_strong(60, numpy_rng(0, 0, "strong"), (32, 32)))
    weak(images, draw_weak(60, numpy_rng(0, 0, "weak"), (32, 32)), MEAN, STD)
    assert torch.equal(images, before)


def test_no_images() -> None:
    images = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    assert strong(images, draw_strong(0, numpy_rng(0, 0, "s"), (32, 32))).shape == images.shape
    assert weak(images, draw_weak(0, numpy_rng(0, 0, "w"), (32, 32)), MEAN, STD).shape == images.shape


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (24, 40), (33, 31), (8, 8)])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("pad_mode", ["reflect", "zero"])
def test_weak_is_flip_pad_crop_normalise(size: tuple[int, int], channels: int, pad_mode: str) -> None:
    rng = numpy_rng(0, 0, "weak")
    images = varied_images(40, channels, size, rng)
    mean, std = MEAN[:channels], STD[:channels]
    draws = draw_weak(40, rng, size, WeakPolicy(pad=4, pad_mode=pad_mode))
    ours = weak(torch.from_numpy(images), draws, mean, std).numpy()
    for i, image in enumerate(images):
        flipped = image[:, :, ::-1] if draws.flip[i] else image
        padded = np.pad(flipped, ((0, 0), (4, 4), (4, 4)), mode="reflect" if pad_mode == "reflect" else "constant")
        top, left = draws.top[i] + 4, draws.left[i] + 4
        cut = padded[:, top:top + size[0], left:left + size[1]]
        wanted = (cut / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
        np.testing.assert_allclose(ours[i], wanted, rtol=0, atol=1e-6)


def test_crop_smaller_than_the_image() -> None:
    rng = numpy_rng(0, 0, "crop")
    images = varied_images(400, 3, (20, 18), rng)
    draws = draw_weak(400, rng, (20, 18), WeakPolicy(flip=False, pad=2, crop=16))
    assert (draws.top.min(), draws.top.max()) == (-2, 6) and (draws.left.min(), draws.left.max()) == (-2, 4)
    ours = weak(torch.from_numpy(images), draws, (0, 0, 0), (1, 1, 1))
    assert ours.shape == (400, 3, 16, 16)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    for i in range(400):
        cut = padded[i, :, draws.top[i] + 2:draws.top[i] + 18, draws.left[i] + 2:draws.left[i] + 18]
        np.testing.assert_allclose(ours[i].numpy() * 255, cut, rtol=0, atol=1e-4)


def test_bilinear_shift() -> None:
    rng = numpy_rng(0, 0, "subpixel")
    images = varied_images(30, 1, (8, 8), rng)
    draws = draw_weak(30, rng, (8, 8), WeakPolicy(flip=False, pad=1, pad_mode="zero", subpixel=True))
    assert np.abs([draws.top, draws.left]).max() <= 1 and draws.top.std() > 0.3
    ours = weak(torch.from_numpy(images), draws, (0.3,), (0.4,)).numpy()
    for i, (image, top, left) in enumerate(zip(images, draws.top, draws.left, strict=True)):
        padded = np.pad(image[0].astype(np.float64), 2)
        y, x = math.floor(top), math.floor(left)
        ty, tx = float(top) - y, float(left) - x
        rows = (1 - ty) * padded[2 + y:10 + y] + ty * padded[3 + y:11 + y]
        shifted = (1 - tx) * rows[:, 2 + x:10 + x] + tx * rows[:, 3 + x:11 + x]
        np.testing.assert_allclose(ours[i, 0], (shifted / 255 - 0.3) / 0.4, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (12, 9)])
def test_bilinear_shift_by_whole_pixels_is_the_plain_one(size: tuple[int, int]) -> None:
    rng = numpy_rng(0, 0, "whole")
    images = torch.from_numpy(varied_images(64, 3, size, rng))
    draws = draw_weak(64, rng, size, WeakPolicy(pad=2, pad_mode="zero"))
    as_floats = WeakDraws(draws.flip, draws.top.astype(np.float32), draws.left.astype(np.float32), size, "zero")
    torch.testing.assert_close(weak(images, as_floats, MEAN, STD), weak(images, draws, MEAN, STD), rtol=0, atol=2e-5)


def test_quarter_turns() -> None:
    images = torch.arange(2 * 3 * 9).reshape(6, 1, 3, 3)
    turns = np.array([3, 0, 2, 1, 1, 3])
    ours = rotate_quarter_turns(images, turns)
    for image, turn, result in zip(images, turns, ours, strict=True):
        assert torch.equal(result, image.rot90(int(turn), (1, 2)))


def test_parts_of_the_global_draw() -> None:
    # What two ranks compute from their halves is what one computes from all.
    images = torch.from_numpy(varied_images(24, 3, (32, 32), numpy_rng(0, 0, "images")))
    of_strong = draw_strong(24, numpy_rng(3, 7, "strong"), (32, 32))
    of_weak = draw_weak(24, numpy_rng(3, 7, "weak"), (32, 32))
    whole = weak(strong(images, of_strong), of_weak, MEAN, STD)
    halves = [weak(strong(images[part], of_strong[part]), of_weak[part], MEAN, STD)
              for part in (slice(0, 12), slice(12, 24))]
    assert torch.equal(whole, torch.cat(halves))


def test_draws_are_those_of_the_paper() -> None:
    n = 20_000
    weak_draws = draw_weak(n, numpy_rng(0, 0, "weak"), (32, 32))
    assert abs(weak_draws.flip.mean() - 0.5) < 0.02
    for shift in (weak_draws.top, weak_draws.left):
        counts = np.bincount(shift + 4, minlength=9)
        assert len(counts) == 9 and counts.min() > 0.9 * n / 9
    draws = draw_strong(n, numpy_rng(0, 0, "strong"), (24, 40))
    assert np.bincount(draws.operations.ravel(), minlength=14).min() > 0.93 * 3 * n / 14
    for i, (low, high) in enumerate(RANGES.values()):
        v = draws.magnitudes[draws.operations == i]
        assert low <= v.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < v.max() <= high
    assert 0 <= draws.cutout_fraction.min() and 0.49 < draws.cutout_fraction.max() < 0.5
    assert draws.cutout_centre.min() > 1 and np.allclose(draws.cutout_centre.max(0), (40, 24), atol=0.05)


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_cutout_paints_inclusive_corners(fraction: float) -> None:
    black = torch.zeros(1, 3, 20, 30, dtype=torch.uint8)
    draws = StrongDraws(np.zeros((1, 0)), np.zeros((1, 0)), np.array([fraction]), np.array([[15.0, 10.0]]))
    painted = (cutout(black, draws, (1, 2, 3)) == torch.tensor([1, 2, 3]).reshape(3, 1, 1)).all(1)
    assert painted.sum() == (int(fraction * 30) + 1) ** 2  # the width decides in both directions


@pytest.mark.parametrize("colour, channels", [(None, 1), ((7,), 1), (None, 3)])
def test_cutout_colour(colour: tuple[int, ...] | None, channels: int) -> None:
    images = torch.zeros(1, channels, 8, 8, dtype=torch.uint8)
    draws = StrongDraws(np.zeros((1, 0)), np.zeros((1, 0)), np.array([0.5]), np.array([[4.0, 4.0]]))
    wanted = colour or {1: (Image.new("RGB", (1, 1), (125, 123, 114)).convert("L").getpixel((0, 0)),),
                        3: (125, 123, 114)}[channels]
    assert tuple(cutout(images, draws, colour)[0, :, 4, 4].tolist()) == wanted


def test_normalise_of_every_value() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    wanted = (values.double() / 255 - torch.tensor(MEAN).double().reshape(3, 1, 1)) / torch.tensor(
        STD).double().reshape(3, 1, 1)
    torch.testing.assert_close(normalise(values, MEAN, STD).double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy, size, word", [
    (dict(pad=4), (4, 40), "reflection"),
    (dict(pad=1, crop=12), (8, 8), "window"),
])
def test_images_too_small(policy: dict[str, int], size: tuple[int, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        draw_weak(2, numpy_rng(0, 0, "small"), size, WeakPolicy(**policy))


@pytest.mark.parametrize("policy, word", [
    (dict(pad_mode="mirror"), "pad_mode"),
    (dict(subpixel=True), "pad_mode zero"),
    (dict(subpixel=True, pad_mode="zero", crop=4), "no crop"),
])
def test_policies_that_do_not_exist(policy: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        WeakPolicy(**policy)


@pytest.mark.parametrize("shape", [(300, 3, 32, 32), (200, 1, 8, 8), (100, 3, 17, 20)])
def test_what_a_gpu_computes_is_the_same(shape: tuple[int, ...]) -> None:
    """On GPUs every operation is computed for every image and one is chosen: byte for byte what `apply` does here."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    images[:20] //= 40  # few levels, as drawings have
    draws = draw_strong(len(images), rng, shape[2:])
    found = images
    for packed in torch.from_numpy(randaugment.pack(draws.operations, draws.magnitudes, *shape[2:])):
        found = randaugment.layer(found, packed)
    assert torch.equal(found, apply(images, draws.operations, draws.magnitudes))


def test_photographs_of_different_sizes_together() -> None:
    """On GPUs they share a canvas; byte for byte what each gives alone."""
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8))
              for size in rng.integers(5, 40, (150, 2))]
    images[3][:] = images[3] // 200
    draws = draw_strong(len(images), rng, (32, 32))
    found = strong_photographs(images, draws)
    for number, (image, ours) in enumerate(zip(images, found, strict=True)):
        alone = strong(image[None], draws[number:number + 1])
        assert torch.equal(ours, alone[0]), (number, draws.operations[number])
