"""dataset_tool.py's label noise and test splits, and the labels of folders without a dataset.json."""
from __future__ import annotations

import json
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from EDM.dataset_tool import main
from EDM.training.dataset import open_training_set
from shared.data.formats import CIFAR10, CIFAR100
from shared.data.images import ImageSet, read_images
from shared.data.writers import write_npz
from tests.golden.cases import each, serves, whole
from tests.golden.data_sources import add_to_tar, write_idx
from tests.golden.tdsm_cases import cases_of, stored

FLIPS, CONVERSIONS, FOLDERS = cases_of("label flips"), cases_of("conversion"), cases_of("folder labels")
SERVES = serves(FLIPS, CONVERSIONS, FOLDERS)


def convert(*args: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        main([str(argument) for argument in args])


@each(FLIPS)
def test_label_flips(case: dict[str, Any], tmp_path: Path) -> None:
    given = stored(case)
    clean, noisy = given["clean"], given["noisy"]
    images = ImageSet(np.zeros((len(clean), 1, 4, 4), np.uint8), clean, tuple(map(str, range(case["num_classes"]))), "")
    write_npz(images, tmp_path / "clean.npz")
    dest, seed = tmp_path / f"{case['dataset']}.zip", whole(case["flip_rng"], r"seed\(#\)")
    convert("--source", tmp_path / "clean.npz", "--dest", dest, "--noise_type", case["noise_type"], "--noise_rate",
            case["noise_rate"], "--seed", seed)
    assert read_images(dest).labels.tolist() == noisy.tolist()
    with zipfile.ZipFile(dest) as archive:
        content = json.loads(archive.read("dataset.json"))
    assert [label for _, label in content["clean_labels"]] == clean.tolist()
    assert [flip[1:] for flip in content["flips"]] == np.stack([clean, noisy], 1)[clean != noisy].tolist()


def write_archive(case: dict[str, Any], folder: Path) -> Path:
    """Write the case's rows in the form of its data set and return the file that is the source.

    Rows of two sides are MNIST's, those of classes beyond the tenth CIFAR-100's; CIFAR's are the test split's if the
    flags ask for that.
    """
    raw, labels = stored(case)["raw"], stored(case)["labels"]
    if raw.ndim == 3:
        write_idx(folder / "t10k-images-idx3-ubyte.gz", raw)
        write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels.astype(np.uint8))
        return folder / "t10k-images-idx3-ubyte.gz"
    layout = CIFAR100 if labels.max() >= 10 else CIFAR10
    names = layout.test if "--eval" in " ".join(map(str, case["flags"])) else layout.train
    with tarfile.open(folder / layout.archive, "w:gz") as archive:
        for name, rows in zip(names, np.array_split(np.arange(len(raw)), len(names)), strict=True):
            batch = {"data": np.ascontiguousarray(raw[rows]), layout.labels: labels[rows].tolist()}
            add_to_tar(archive, f"{layout.folder}/{name}", pickle.dumps(batch))
    return folder / layout.archive


@each(CONVERSIONS)
def test_conversion_of_test_splits(case: dict[str, Any], tmp_path: Path) -> None:
    dest = tmp_path / "out.zip"
    convert("--source", write_archive(case, tmp_path), "--dest", dest, *case["flags"])
    expected = stored(case)["images"]
    with zipfile.ZipFile(dest) as archive:
        assert archive.namelist() == case["archive_entries_in_order"]
        assert sorted({entry.compress_type for entry in archive.infolist()}) == case["zip_compress_types"]
        assert archive.read("dataset.json").decode() == case["dataset_json_text"]
        images = []
        for name in archive.namelist()[:-1]:
            with archive.open(name) as file:
                images.append(Image.open(file).copy())
    assert sorted({image.mode for image in images}) == case["png_modes"]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), expected)


@each(FOLDERS)
def test_labels_of_folders_without_json(case: dict[str, Any], tmp_path: Path) -> None:
    for name in case["files"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    found = open_training_set(tmp_path, use_labels=True)
    assert found.label_dim == case["label_dim"]
    np.testing.assert_array_equal(found.labels, stored(case)["onehot"])
