"""Photographs: both decoders give the same pixels, batches follow from the step, bad ones are named or replaced."""
from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from MetaSemi.imagenet.views import CentreCrop, Epochs, RandomCrop, resize
from shared.cli import UserError
from shared.data.photographs import MEAN, STD, Photographs, Request, list_photographs, looks_whole
from shared.data.pool import batches, choose_decoder
from shared.training.randomness import numpy_rng
from TorchSSL.encoders.images import own_images

CPU = torch.device("cpu")
LEVEL = 1 / 255 / min(STD)  # one grey level, normalised
SIZES = ((60, 90), (75, 50), (64, 64), (33, 120), (47, 201), (90, 61), (130, 131))


def encoded(kind: str = "JPEG") -> list[bytes]:
    """Return photographs of all SIZES as files, one gray among them."""
    whole = load_sample_images().images
    files = []
    for number, (height, width) in enumerate(SIZES):
        image = Image.fromarray(whole[number % 2][10 * number:10 * number + height, 20:20 + width])
        stream = io.BytesIO()
        (image.convert("L") if number == 2 else image).save(stream, kind)
        files.append(stream.getvalue())
    return files


class Stored:
    """Files in memory; the label is the position."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, position: int) -> str:
        return f"set: record {position}"

    def get(self, position: int) -> tuple[bytes, float]:
        return self.files[position], float(position)


def photographs(files: list[bytes] | None = None, skip_bad: bool = False) -> Photographs:
    return Photographs(Stored(files or encoded()), 10, skip_bad)


def train_batches(decoder: str, pool: Photographs, steps: range, seed: int = 0, workers: int = 2) -> list:
    view, order = RandomCrop(32), Epochs(len(pool), 4, lambda step, what: numpy_rng(seed, step, what), "order")

    def request(step: int) -> Request:
        return Request(order(step), view.draw(4, numpy_rng(seed, step, "crops")))

    return list(batches(pool, view, request, steps, CPU, workers, decoder))


def central_batches(decoder: str, pool: Photographs) -> list:
    return list(batches(pool, CentreCrop(28, 32), lambda step: Request(np.arange(len(pool))[4 * step:4 * step + 4]),
                        range(2), CPU, 2, decoder))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decoders_agree_within_one_grey_level(kind: str) -> None:
    files = encoded(kind)
    for make in (lambda decoder: train_batches(decoder, photographs(files), range(6)),
                 lambda decoder: central_batches(decoder, photographs(files))):
        ours, theirs = make("torchvision"), make("dali")
        assert len(ours) == len(theirs) > 1
        for (images, labels), (others, their_labels) in zip(ours, theirs, strict=True):
            assert images.dtype == others.dtype == torch.float32 and labels.dtype == their_labels.dtype == torch.int64
            assert images.shape == others.shape and torch.equal(labels, their_labels)
            assert (images - others).abs().max() <= LEVEL * 1.0001


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_a_stream_can_begin_anywhere(decoder: str) -> None:
    pool = photographs()
    whole, rest = train_batches(decoder, pool, range(7)), train_batches(decoder, pool, range(4, 7), workers=1)
    assert all(torch.equal(one, other) for a, b in zip(whole[4:], rest, strict=True)
               for one, other in zip(a, b, strict=True))
    assert not torch.equal(whole[0][0], train_batches(decoder, pool, range(1), seed=1)[0][0])


def test_epochs_show_every_photograph() -> None:
    order = Epochs(10, 4, lambda step, what: numpy_rng(0, step, what), "order")
    assert order.length == 3
    first, second = (np.concatenate([order(step) for step in steps]) for steps in (range(3), range(3, 6)))
    assert set(first) == set(second) == set(range(10)) and len(first) == 12
    assert list(first[10:]) == list(first[:2]) and list(first) != list(second)
    assert list(order(1)) == list(first[4:8])  # also when asked for again


def test_crops_have_the_published_bounds() -> None:
    crops = RandomCrop().draw(2000, np.random.default_rng(0))
    windows = np.array([crops.window(number, 300, 400) for number in range(2000)])
    top, left, height, width = windows.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 400).all()
    area, aspect = height * width / 120_000, width / height
    assert 0.099 < area.min() < 0.12 and 0.9 < area.max() <= 1
    assert 0.79 < aspect.min() < 0.82 and 1.22 < aspect.max() < 1.27
    assert abs(crops.flip.mean() - 0.5) < 0.05
    # Uniform in the room that is left.
    assert abs((top / np.maximum(300 - height, 1)).mean() - 0.5) < 0.03


def test_an_image_too_thin_for_any_crop() -> None:
    crops = RandomCrop(area=(0.9, 1.0)).draw(1, np.random.default_rng(0))
    top, left, height, width = crops.window(0, 10, 1000)
    assert height == 10 and 8 <= width <= 13 and top == 0 and left == (1000 - width) // 2


def test_the_central_view_keeps_its_scale() -> None:
    """A gradient along the longer side comes out with the slope of the shorter one's scale."""
    ramp = np.tile(np.arange(145, dtype=np.uint8)[None, :, None], (60, 1, 3))
    view = CentreCrop(20, 32)(Image.fromarray(ramp))[:, :, 0].astype(float)
    assert abs(view[0, -1] - view[0, 0] - 19 * 60 / 32) <= 1
    assert abs(view.mean() - 72) < 1.1  # an odd rest is cut off on the left


def test_resizing_repeats_the_edge() -> None:
    """A border of one colour stays pure at the edge although the filter reaches over it."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:8] = 200
    small = resize(pixels, 10, 10)
    assert (small[0] == 200).all() and (small[-1] == 0).all()


class TestBad:
    def files(self) -> list[bytes]:
        files = encoded()
        return [files[0], files[1][:-50], b"", b"no image", files[4], files[5], files[6]]

    def test_what_looks_whole(self) -> None:
        assert [looks_whole(file) for file in self.files()] == [True, False, False, False, True, True, True]
        assert all(looks_whole(file) for file in encoded("PNG"))

    @pytest.mark.parametrize("decoder", ["dali", "torchvision"])
    def test_the_first_is_named(self, decoder: str) -> None:
        with pytest.raises(UserError, match=r"set: record [123].* cut short or not an image .*--skip-bad"):
            train_batches(decoder, photographs(self.files()), range(4))

    @pytest.mark.parametrize("decoder", ["dali", "torchvision"])
    def test_the_next_good_one_stands_in(self, decoder: str, capsys: pytest.CaptureFixture) -> None:
        pool = photographs(self.files(), skip_bad=True)
        labels = torch.cat([labels for _, labels in train_batches(decoder, pool, range(8))])
        assert set(labels.tolist()) == {0, 4, 5, 6} and sorted(pool.bad) == [1, 2, 3]
        assert capsys.readouterr().err.count("left out") == 3
        again = torch.cat([labels for _, labels in train_batches(decoder, pool, range(8))])
        assert torch.equal(labels, again)
        assert torch.equal(labels, torch.cat([one for _, one in train_batches(
            "torchvision", photographs(self.files(), skip_bad=True), range(8))]))

    @pytest.mark.parametrize("decoder", ["dali", "torchvision"])
    def test_evaluation_does_not_count_them(self, decoder: str) -> None:
        made = central_batches(decoder, photographs(self.files(), skip_bad=True))
        assert [labels.tolist() for _, labels in made] == [[0, -1, -1, -1], [4, 5, 6]]

    @pytest.mark.parametrize("decoder", ["dali", "torchvision"])
    def test_labels_beyond_the_classes(self, decoder: str) -> None:
        pool = Photographs(Stored(encoded()), 5)
        with pytest.raises(UserError, match=r"set: record [56] has the label [56]; expected a class from 0 to 4"):
            train_batches(decoder, pool, range(4))

    def test_nothing_usable(self) -> None:
        with pytest.raises(UserError, match="none of 2 photographs"):
            train_batches("torchvision", photographs([b"a", b"b"], skip_bad=True), range(1))


def test_without_dali_torchvision_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_decoder("auto") == "dali"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_decoder("auto") == "torchvision"
    with pytest.raises(UserError, match="not installed: pip install"):
        choose_decoder("dali")


def test_normalised_as_imagenet_is() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 128, np.uint8)).save(stream, "PNG")
    images, _ = central_batches("torchvision", photographs([stream.getvalue()] * 5))[0]
    expected = [(128 / 255 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    np.testing.assert_allclose(images.mean((0, 2, 3)), expected, atol=1e-5)


def test_one_bit_of_a_photograph_is_another_content(tmp_path: Path) -> None:
    """Also in a file of the same size and time, of which only the inode or the time of change differs."""
    file = tmp_path / "set" / "cat" / "0.bmp"
    file.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((80, 90, 3), np.uint8)).save(file)

    def fingerprints() -> tuple[str, str]:
        return list_photographs(tmp_path / "set").fingerprint, own_images(str(tmp_path / "set"), "train").fingerprint

    before, state, content = fingerprints(), file.stat(), bytearray(file.read_bytes())
    assert fingerprints() == before
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert all(one != other for one, other in zip(fingerprints(), before, strict=True))
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "set").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "set")
    assert fingerprints() == before
