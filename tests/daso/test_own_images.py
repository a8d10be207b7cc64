"""Own images by their path: counts of every class as lists or by head and factor, and what does not fit."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from DASO.lib.config.config import experiment_name, parse
from DASO.lib.data.sets import TrainingData, load_data
from shared.cli import UserError

NAMES = ("bird", "cat", "owl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "photos"
    for split, count in (("train", 20), ("val", 2), ("unlabeled", 3)):
        for level, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (80 * level, index, 0)).save(folder / split / name / f"{index:02d}.png")
    return folder


def read(folder: Path, *pairs: str) -> TrainingData:
    config, _ = parse(["DATASET.NAME", str(folder), "MODEL.NUM_CLASSES", "3", "DATASET.NUM_VALID", "0",
                       "ALGORITHM.NAME", "FixMatch", "DATASET.RESOLUTION", "8", "SEED", "0", *pairs])
    return load_data(config)


def test_counts_as_lists(folder: Path, tmp_path: Path) -> None:
    data = read(folder, "DATASET.LABELED_COUNTS", "9,4,1")
    assert data.counts.tolist() == [9, 4, 1] and data.labelled.classes == NAMES
    assert len(data.unlabelled) == 9 and set(data.unlabelled.labels.tolist()) == {-1}  # unlabeled/
    assert len(data.test) == 6 and data.look.mean[2] == 0
    (tmp_path / "photos").mkdir()
    for split in ("train", "val"):
        (tmp_path / "photos" / split).symlink_to(folder / split)
    data = read(tmp_path / "photos", "DATASET.LABELED_COUNTS", "9,4,1", "DATASET.UNLABELED_COUNTS", "[2, 3, 5]")
    assert np.bincount(data.unlabelled.labels).tolist() == [2, 3, 5] and data.counts.tolist() == [9, 4, 1]


def test_counts_by_head_and_fractional_factor(folder: Path) -> None:
    data = read(folder, "DATASET.OWN.NUM_LABELED_HEAD", "10", "DATASET.OWN.IMB_FACTOR_L", "2.5")
    assert data.counts.tolist() == [10, 6, 4]
    config, _ = parse(["DATASET.NAME", str(folder), "DATASET.OWN.IMB_FACTOR_L", "2.5"])
    assert experiment_name(config, 0) == "Supervised_photos_l_40_2.5_seed_0"


@pytest.mark.parametrize(("pairs", "message"), [
    (["DATASET.LABELED_COUNTS", "9,4"], r"LABELED_COUNTS: 2 numbers, but .* has 3 classes \(bird, cat, owl\)"),
    (["DATASET.LABELED_COUNTS", "9,4,30"], "class 2 has 20 images left for the labelled set, but 30"),
    (["DATASET.LABELED_COUNTS", "9,4,-1"], "not in the range"), (["DATASET.OWN.IMB_FACTOR_L", "0.5"], "IMB_FACTOR_L"),
    (["DATASET.NAME", "nowhere"], "neither one of cifar10, .* nor a folder"),
    (["MODEL.NUM_CLASSES", "4", "DATASET.LABELED_COUNTS", "1,1,1"], "set MODEL.NUM_CLASSES 3")])
def test_what_does_not_fit(pairs: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(folder, *pairs)
