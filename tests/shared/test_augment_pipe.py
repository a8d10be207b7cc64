"""The augmentation pipe: what it does to images, and what its draws are."""
from __future__ import annotations

import math

import pytest
import torch

from EDM.training.augment import COLUMNS, AugmentPipe, margins, rotation, scaling, translation, warp

EVERYTHING = dict.fromkeys(("xflip", "yflip", "rotate_int", "translate_int", "scale", "rotate_frac", "aniso",
                            "translate_frac", "brightness", "contrast", "lumaflip", "hue", "saturation"), 1.0)
TRAINING = dict(p=0.12, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand([count, channels, size, size], generator=generator(7)) * 2 - 1


def smooth(count: int = 2, size: int = 24) -> torch.Tensor:
    """Return images of low frequencies, which resampling leaves as they are."""
    line = torch.linspace(0, 1, size)
    waves = torch.stack([torch.sin(2 * math.pi * (a * line[:, None] + b * line)) for a, b in ((1, 0.5), (-0.5, 1))])
    return waves[None].expand(count, -1, -1, -1).contiguous()


def parameters(count: int, **values: float) -> torch.Tensor:
    return torch.tensor([[values.get(name, 0.0) for name in COLUMNS]]).expand(count, -1)


def test_draws_follow_their_probabilities():
    pipe = AugmentPipe(**{**EVERYTHING, "p": 0.3, "xflip": 1e8})
    drawn = dict(zip(COLUMNS, pipe.draw(20000, generator()).unbind(1), strict=True))
    shares = {name: (values != 0).double().mean().item() for name, values in drawn.items()}
    assert shares["xflip"] == pytest.approx(0.5, abs=0.02)  # always decided, by a fair coin
    assert shares["rotate_int"] == pytest.approx(0.3 * 0.75, abs=0.02)
    assert (shares["yflip"], shares["lumaflip"]) == pytest.approx((0.15, 0.15), abs=0.02)
    assert shares["aniso_direction"] == pytest.approx(0.5, abs=0.02)  # not times p
    for name in ("translate_int_x", "scale", "rotate_frac", "aniso", "translate_frac_y", "brightness", "contrast",
                 "hue", "saturation"):
        assert shares[name] == pytest.approx(0.3, abs=0.02), name
    assert torch.equal(drawn["translate_int_x"] != 0, drawn["translate_int_y"] != 0)  # one decision for both
    applied = {name: values[values != 0] for name, values in drawn.items()}
    assert applied["rotate_frac"].abs().max() <= math.pi and applied["rotate_frac"].std() > 1.7
    assert applied["scale"].std().item() == pytest.approx(1, abs=0.05)


def test_same_generator_same_draws_and_parts_of_a_batch_are_parts():
    pipe = AugmentPipe(**TRAINING)
    drawn = pipe.draw(8, generator(3))
    assert torch.equal(drawn, pipe.draw(8, generator(3)))
    whole, labels = pipe.apply(images(8), drawn)
    part, part_labels = pipe.apply(images(8)[2:5], drawn[2:5], pipe.margins(drawn, 16, 16))
    assert torch.allclose(part, whole[2:5], atol=1e-6) and torch.equal(part_labels, labels[2:5])


def test_images_are_continued_as_far_as_their_batch_reaches():
    """Beyond the margin is nothing, so a batch's border pixels depend on its own images only up to that margin."""
    still = torch.eye(3).expand(2, 3, 3)
    assert margins(still, 16, 24).tolist() == [[6, 6], [6, 6]]
    moved = torch.stack([torch.eye(3), translation(torch.tensor(2.5), torch.tensor(-100.0))])
    assert margins(moved, 16, 24).tolist() == [[6, 15], [9, 6]]  # at most once the image
    given = images(2, size=16)
    shrunk = scaling(*torch.full([2, 2], 4.0))
    assert torch.equal(warp(given, shrunk), warp(given, shrunk, torch.full([2, 2], 15.0)))
    assert (warp(given, shrunk, torch.full([2, 2], 2.0))[:, :, 0] == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_happens_at_probability_zero(channels):
    given = images(channels=channels)
    pipe = AugmentPipe(**EVERYTHING, p=0)
    out, labels = pipe.apply(given, pipe.draw(4, generator()))
    assert torch.allclose(out, given, atol=3e-6) and not labels.any() and labels.shape == (4, pipe.label_dim)


def test_labels_and_columns_of_the_training_set():
    pipe = AugmentPipe(**TRAINING)
    assert pipe.label_dim == 9
    values = dict(xflip=1.0, scale=0.5, rotate_frac=0.3, aniso=0.7, aniso_direction=0.2, translate_frac_x=0.1,
                  translate_frac_y=-0.4)
    _, labels = pipe.apply(images(2), parameters(2, **values))
    expected = [1, 0, 0.5, math.cos(0.3) - 1, math.sin(0.3), 0.7 * math.cos(0.2), 0.7 * math.sin(0.2), 0.1, -0.4]
    assert torch.allclose(labels, torch.tensor(expected).expand(2, -1), atol=1e-6)


def test_no_augmentation_leaves_images_and_gives_no_labels():
    pipe, given = AugmentPipe(), images()
    out, labels = pipe.apply(given, pipe.draw(4, generator()))
    assert torch.equal(out, given) and labels.shape == (4, 0)


@pytest.mark.parametrize(("quarter", "flips"), [(1, (3,)), (2, (3, 2)), (3, (2,))])
def test_quarter_turns(quarter, flips):
    given = images()
    out, _ = AugmentPipe(rotate_int=1).apply(given, parameters(4, rotate_int=quarter))
    expected = given.flip(flips)
    assert torch.equal(out, expected.transpose(2, 3) if quarter in (1, 3) else expected)


def test_shifts_are_mirrored_at_the_edges():
    given = images(size=8)
    pipe = AugmentPipe(translate_int=1, translate_int_max=0.5)
    out, labels = pipe.apply(given, parameters(4, translate_int_x=0.5, translate_int_y=-0.25))
    for y in range(8):
        for x in range(8):
            source = given[:, :, abs(y - 1), abs(x - 2)]
            assert torch.equal(out[:, :, y, x], source)
    assert torch.allclose(labels, torch.tensor([2 / 4, -1 / 4]).expand(4, -1))


def test_a_quarter_turn_by_resampling_is_a_quarter_turn():
    given = smooth()
    out = warp(given, rotation(torch.full([2], math.pi / 2)))
    inside = slice(4, -4)  # the filter is not quite symmetric, which a turn shows as a shift of 0.03 pixels
    assert torch.allclose(out[..., inside, inside], torch.rot90(given, 1, (2, 3))[..., inside, inside], atol=3e-2)


def test_resampling_by_whole_pixels_is_a_shift():
    given, zero = smooth(), torch.zeros(2)
    out = warp(given, translation(torch.full([2], 3.0), zero))
    assert torch.allclose(out[..., :-3], given[..., 3:], atol=1e-4)


def test_doubling_and_halving_the_size():
    given = smooth(size=32)
    larger = warp(given, scaling(*torch.full([2, 2], 0.5)))  # each output pixel looks half as far from the centre
    centre = torch.nn.functional.interpolate(given[..., 8:24, 8:24], scale_factor=2, mode="bicubic")
    assert torch.allclose(larger[..., 3:-3, 3:-3], centre[..., 3:-3, 3:-3], atol=3e-2)


def test_colours():
    given = images()
    gray = given.mean(dim=1, keepdim=True)

    def apply(**values):
        pipe = AugmentPipe(**dict.fromkeys(values, 1.0))
        return pipe.apply(given, parameters(4, **values))[0]

    assert torch.allclose(apply(brightness=0.5), given + 0.1, atol=1e-6)
    assert torch.allclose(apply(contrast=-2.0), given * 0.5, atol=1e-6)
    assert torch.allclose(apply(lumaflip=1.0), given - 2 * gray, atol=1e-6)
    assert torch.allclose(apply(hue=2 * math.pi / 3), given.roll(1, dims=1), atol=1e-5)  # red becomes green
    assert torch.allclose(apply(saturation=-1.0), gray + (given - gray) / 2, atol=1e-6)


def test_images_that_an_augmentation_is_not_defined_for():
    with pytest.raises(ValueError, match="square"):
        AugmentPipe(rotate_int=1).apply(torch.zeros(2, 3, 8, 4), parameters(2))
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        AugmentPipe(hue=1).apply(torch.zeros(2, 4, 8, 8), parameters(2))


def test_wide_images():
    given = torch.rand([2, 3, 8, 20])
    options = {name: value for name, value in EVERYTHING.items() if name != "rotate_int"}
    out, _ = AugmentPipe(**options, p=0).apply(given, parameters(2))
    assert out.shape == given.shape and torch.allclose(out, given, atol=3e-6)


def test_nothing_waits_for_the_device():
    """One graph: no number is read back and no shape depends on one."""
    pipe = AugmentPipe(**EVERYTHING)
    given, drawn = images(), pipe.draw(4, generator())
    expected, expected_labels = pipe.apply(given, drawn)
    torch.compiler.reset()
    out, labels = torch.compile(pipe.apply, fullgraph=True, backend="eager")(given, drawn)
    assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(labels, expected_labels)
