"""Lists and record files of ImageNet: splits, .lst, .idx and .rec bytes, re-encoded pixels."""
from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from MetaSemi.imagenet import im2rec
from MetaSemi.imagenet.packing import pack
from MetaSemi.imagenet.records import RecordFile
from MetaSemi.imagenet.split_imagenet import split
from tests.golden.cases import arrays, each, facts, number
from tests.golden.metasemi_cases import PAPER, Case, cases_of, each_key, section

LISTS_BY_HASH = cases_of("misc", "train_labeled")
IM2REC = section("im2rec")
DESCRIBED = facts(PAPER, IM2REC.get("description_file", ""))
BYTES = arrays(PAPER, IM2REC.get("file", ""))
SERVES = {*(("misc", case["name"]) for case in LISTS_BY_HASH), *(("im2rec", name) for name in DESCRIBED)}
KNOWN = {"lists", "records", "shuffle_order_by_N"}


def trees(folder: Path) -> Path:
    """Write every file of the fixtures that is no result below `folder`."""
    if not BYTES:
        pytest.skip("there are no files")
    for name, content in BYTES.items():
        if not name.startswith(("out/", "decoded/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.tobytes())
    return folder


@each(LISTS_BY_HASH)
def test_split_lists(case: Case) -> None:
    labeled, unlabeled = split(case["files"], case["seed"], case["per_class"], case["fraction"])
    assert labeled == case["train_labeled"]
    assert unlabeled == case["train_unlabeled"]


def test_every_kind_of_description_is_served() -> None:
    assert set(DESCRIBED) <= KNOWN


@each_key(DESCRIBED.get("lists", ()))
def test_lists(name: str, tmp_path: Path) -> None:
    case = DESCRIBED["lists"][name]
    trees(tmp_path)
    made = tmp_path / "made"
    made.mkdir()
    root = tmp_path / case.get("root", "tree")
    im2rec.write_lists(im2rec.read_options([str(made / "out"), str(root), "--list", *case["flags"]]))
    assert {path.name: path.read_bytes().decode() for path in made.iterdir()} == case["files"]


@each_key(DESCRIBED.get("records", ()))
def test_records(name: str, tmp_path: Path) -> None:
    case = DESCRIBED["records"][name]
    trees(tmp_path)
    path = tmp_path / "made" / f"{name}.lst"
    path.parent.mkdir()
    path.write_text(case["lst"])
    # As the original does, whatever cannot be read is left out.
    flags = [str(path.with_suffix("")), str(tmp_path / case["root"]), *case["flags"], "--skip-bad"]
    pack(path, im2rec.read_options(flags))
    served = {"root", "flags", "lst"}
    if "idx" in case:
        served |= {"idx", "rec"}
        assert path.with_suffix(".idx").read_bytes().decode() == case["idx"]
        assert path.with_suffix(".rec").read_bytes() == BYTES[case["rec"]].tobytes()
    file = RecordFile(path.with_suffix(".rec"))
    for key in [key for key in case if key.startswith("entries")]:
        served.add(key)
        check_entries(file, case[key])
    if "decoded" in case:
        served.add("decoded")
        check_pixels(file, case)
    assert set(case) == served


def check_entries(file: RecordFile, entries: list) -> None:
    """Compare records with (key, flag, labels, id, id2, length of the payload if it is known)."""
    assert len(file) == len(entries)
    for position, (key, flag, labels, identity, _, *length) in enumerate(entries):
        record = file.read(position)
        assert file.ids[position] == key and record.number == identity
        assert list(record.labels) == labels and len(record.labels) == (flag or 1)
        assert not length or len(record.payload) == length[0]


def check_pixels(file: RecordFile, case: dict) -> None:
    """Compare decoded images with those of the original, which are in BGR order."""
    for position in range(len(file)):
        record = file.read(position)
        expected = BYTES[case["decoded"].replace("<key>", str(record.number))]
        found = np.asarray(Image.open(io.BytesIO(record.payload)))
        found = found[..., ::-1] if found.ndim == 3 else found
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= number(IM2REC["tolerance"], r"\+-#")


@each_key(DESCRIBED.get("shuffle_order_by_N", ()))
def test_shuffle(name: str) -> None:
    order = list(range(int(name)))
    random.Random(im2rec.SHUFFLE_SEED).shuffle(order)
    assert order == DESCRIBED["shuffle_order_by_N"][name]
