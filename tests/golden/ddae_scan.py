"""The order and the labels in which Tiny-ImageNet is read."""
from __future__ import annotations

import pytest

from DDAE.ddae.data import scan
from tests.golden.cases import facts

FILE = "tiny_imagenet_scan.json"
SERVES: set[tuple[str, str]] = set()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    listed, folder = facts("ddae", FILE), tmp_path_factory.mktemp("tiny")
    root = folder / "tiny-imagenet-200"
    for name in listed["train_files_created"]:
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in listed["labels"]:
        (root / "train" / name).mkdir(parents=True, exist_ok=True)
    (root / "val" / "images").mkdir(parents=True)
    for line in listed["val_annotations"]:
        (root / "val" / "images" / line.split("\t")[0]).touch()
    (root / "val" / "val_annotations.txt").write_text("\n".join(listed["val_annotations"]) + "\n")
    return folder


@pytest.mark.parametrize(("split", "key"), [("train", "expected_train"), ("test", "expected_val")])
@pytest.mark.parametrize("inside", [False, True])
def test_scan(tree, split, key, inside):
    listed = facts("ddae", FILE)
    files, labels, names = scan(tree / "tiny-imagenet-200" if inside else tree, split)
    assert [[name, label] for name, label in zip(files.names, labels.tolist(), strict=True)] == listed[key]
    assert names == listed["labels"]
