"""pseudo_dataset.py: the published CIFAR-10 files, an npz for every other data set, and mistakes."""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.data.datasets import load_dataset
from shared.data.images import ImageSet, read_images
from shared.data.writers import write_folder
from tests.shared.cifar_files import write_cifar
from tests.shared.programs import one_line_error, run

SCRIPT = "TorchSSL/pseudo_dataset.py"


def random_set(count: int, side: int = 32, classes: int = 10) -> ImageSet:
    images = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)
    return ImageSet(images, np.arange(count) % classes, tuple(f"class{c}" for c in range(classes)), "set")


def save_labels(folder: Path, labels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pseudo_label.npy", labels)
    return folder


def test_digits_reach_the_training_set(tmp_path: Path) -> None:
    digits = load_dataset("digits", "train")
    labels = (digits.labels + (np.arange(len(digits)) % 4 == 0)) % 10
    folder = save_labels(tmp_path / "run", labels)
    printed = run(SCRIPT, "--dataset=digits", "--save_path", folder).stdout
    assert float(printed.splitlines()[-1]) == np.mean(labels == digits.labels)
    assert str(np.bincount(labels).tolist()) in printed and str(np.bincount(digits.labels).tolist()) in printed
    written = read_images(folder / "run-pseudo.npz")
    np.testing.assert_array_equal(written.images, digits.images)
    np.testing.assert_array_equal(written.labels, labels)
    run("TorchSSL/dataset_tool.py", f"--source={folder}/run-pseudo.npz", f"--dest={folder}/set.zip")
    found = read_images(folder / "set.zip")
    np.testing.assert_array_equal(found.images, digits.images)
    np.testing.assert_array_equal(found.labels, labels)


def test_cifar10_as_published(tmp_path: Path) -> None:
    write_cifar(random_set(50), tmp_path / "data" / "cifar-10-batches-py")
    labels = np.arange(50) % 7
    for name, args in (("a", ["--data_path", tmp_path / "data" / "cifar-10-batches-py"]),
                       ("b", ["--data_dir", tmp_path / "data"])):
        folder = save_labels(tmp_path / name, labels)
        printed = run(SCRIPT, *args, "--save_path", folder).stdout
        assert "no image of class class7, class8, class9" in printed
        archive = folder / "cifar-10-python.tar.gz"
        for source in (archive, folder / "cifar-10-batches-py"):
            with pytest.warns(UserWarning, match="not as published"):
                found = load_dataset(source, "train")
            np.testing.assert_array_equal(found.labels, labels)
            np.testing.assert_array_equal(found.images, random_set(50).images)


def test_own_images_with_partial_labels(tmp_path: Path) -> None:
    images = random_set(12, side=12, classes=3)
    write_folder(images, tmp_path / "mine" / "train")
    folder = save_labels(tmp_path / "run", np.zeros(12, np.int64))
    printed = run(SCRIPT, f"--dataset={tmp_path / 'mine'}", "--save_path", folder).stdout
    assert float(printed.splitlines()[-1]) == pytest.approx(1 / 3)
    # 12 is no power of two, which only the networks for published sizes ask for.
    run("EDM/dataset_tool.py", f"--source={folder}/run-pseudo.npz", f"--dest={folder}/set.zip")
    assert read_images(folder / "set.zip").images.shape == (12, 3, 12, 12)


@pytest.mark.parametrize("labels, expected", [
    (None, "get_labels.py"), (np.zeros(49, np.int64), "has 49 labels"), (np.full(50, 10), "class 10 is none of the 10"),
    (np.full(50, -1), "one class number"), (np.zeros(50), "one class number"), (np.zeros((50, 1), int), "one class"),
    (np.array([None] * 50), "not a plain array")])
def test_mistakes(tmp_path: Path, labels: np.ndarray | None, expected: str) -> None:
    write_cifar(random_set(50), tmp_path / "cifar-10-batches-py")
    if labels is not None:
        save_labels(tmp_path / "run", labels)
    else:
        (tmp_path / "run").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = run(SCRIPT, "--data_path", tmp_path / "cifar-10-batches-py", "--save_path", tmp_path / "run", status=2)
    assert expected in one_line_error(result)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_images(tmp_path: Path) -> None:
    folder = save_labels(tmp_path / "run", np.zeros(5, np.int64))
    result = run(SCRIPT, "--data_dir", tmp_path, "--save_path", folder, status=2)
    assert "cifar-10-batches-py/ or cifar-10-python.tar.gz not found" in one_line_error(result)
    result = run(SCRIPT, "--dataset=svhn", "--data_path=x", "--save_path", folder, status=2)
    assert "give one of them" in one_line_error(result)
    shutil.rmtree(folder)
