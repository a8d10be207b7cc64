"""The EDM training set: labels whole or refused, names, sizes."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from EDM.training.dataset import open_training_set
from shared.cli import UserError
from shared.data.images import ImageSet
from shared.data.writers import write_folder, write_npz, write_zip


def random_set(count: int = 12, labels: np.ndarray | None = None, classes: int = 3) -> ImageSet:
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), np.uint8)
    return ImageSet(images, np.arange(count) % classes if labels is None else labels, tuple(map(str, range(classes))),
                    "set")


def error_of(*args, **options) -> str:
    with pytest.raises(UserError) as raised:
        open_training_set(*args, **options)
    return str(raised.value)


def test_forms_agree(tmp_path: Path) -> None:
    write_zip(random_set(), tmp_path / "a.zip")
    write_npz(random_set(), tmp_path / "a.npz")
    write_folder(random_set(), tmp_path / "a")
    for name in ("a.zip", "a.npz", "a/"):
        found = open_training_set(f"{tmp_path}/{name}", use_labels=True)
        assert (found.name, found.label_dim, found.resolution, len(found)) == ("a", 3, 8, 12)
        assert sorted(found.labels.argmax(1).tolist()) == [0] * 4 + [1] * 4 + [2] * 4
        np.testing.assert_array_equal(found.labels.sum(1), 1)
        assert open_training_set(f"{tmp_path}/{name}").label_dim == 0


def test_named_classes_keep_their_width(tmp_path: Path) -> None:
    """Pseudo-labels may lack the top class; the label input keeps its width where the classes are named."""
    write_npz(random_set(labels=np.arange(12) % 2), tmp_path / "a.npz")
    with pytest.warns(UserWarning, match="no image of class 2"):
        assert open_training_set(tmp_path / "a.npz", use_labels=True).label_dim == 3


def test_mirrored_items(tmp_path: Path) -> None:
    write_zip(random_set(), tmp_path / "a.zip")
    found = open_training_set(tmp_path / "a.zip", use_labels=True, xflip=True)
    for item in range(12):
        np.testing.assert_array_equal(found[item][0][:, :, ::-1], found[item + 12][0])
        np.testing.assert_array_equal(found[item][1], found[item + 12][1])


@pytest.mark.filterwarnings("ignore:.*have no label")
def test_mistakes(tmp_path: Path) -> None:
    write_npz(random_set(labels=np.array([-1] + [0] * 11)), tmp_path / "partial.npz")
    assert "1 of 12 images have no label" in error_of(tmp_path / "partial.npz", use_labels=True)
    assert open_training_set(tmp_path / "partial.npz").label_dim == 0
    Image.new("RGB", (8, 9)).save(tmp_path / "a.png")
    assert "must be square" in error_of(tmp_path)
    assert "No such file" in error_of(tmp_path / "nowhere.zip")
    assert "nowhere: Path must point to a directory or zip" in error_of(tmp_path / "nowhere")  # as published
    assert "directory or zip" in error_of(tmp_path / "a.png")
