"""Tiny-ImageNet: labelled images from the unpacked folder, and what is said about a damaged one."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from DDAE.ddae.data import load_images
from shared.cli import UserError


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a Tiny-ImageNet of 200 classes, one 64x64 image each, and three validation images."""
    root = tmp_path / "tiny-imagenet-200"
    for label in range(200):
        place = root / "train" / f"n{label:08d}" / "images"
        place.mkdir(parents=True)
        # The gray one is decoded to three channels like all others.
        image = Image.new("L" if label == 7 else "RGB", (64, 64), label if label == 7 else (label, 0, 0))
        image.save(place / f"n{label:08d}_0.JPEG", quality=95)
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for number, label in ((2, 5), (10, 199), (0, 0)):
        Image.new("RGB", (64, 64), (0, label, 0)).save(root / "val" / "images" / f"val_{number}.JPEG", quality=95)
        lines.append(f"val_{number}.JPEG\tn{label:08d}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    return tmp_path


def test_images_and_labels(tiny: Path) -> None:
    train, test = (load_images("tiny", split, tiny) for split in ("train", "test"))
    assert train.images.shape == (200, 3, 64, 64) and train.labels.tolist() == list(range(200))
    assert np.abs(train.images[:, 0].mean((1, 2)) - np.arange(200)).max() < 3
    assert test.labels.tolist() == [0, 199, 5] and test.classes == train.classes  # val_10 comes before val_2
    assert np.abs(test.images[:, 1].mean((1, 2)) - test.labels).max() < 3


def test_damage(tiny: Path) -> None:
    annotations = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.write_text(text.replace("n00000005", "n99999999"))
    with pytest.raises(UserError, match="val_annotations.txt: line 1: expected a file and one of"):
        load_images("tiny", "test", tiny)
    annotations.write_text("\n".join(text.splitlines()[1:]))
    with pytest.raises(UserError, match="val_2.JPEG is not listed"):
        load_images("tiny", "test", tiny)
    further = tiny / "tiny-imagenet-200" / "train" / "n99999999"
    further.mkdir()
    Image.new("RGB", (64, 64)).save(further / "n99999999_0.JPEG")
    with pytest.raises(UserError, match="expected 200 class folders, found 201"):
        load_images("tiny", "train", tiny)
    with pytest.raises(UserError, match="unpack tiny-imagenet-200.zip there"):
        load_images("tiny", "train", tiny / "elsewhere")
