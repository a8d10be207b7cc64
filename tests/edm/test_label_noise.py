"""dataset_tool.py with label noise: what is flipped, what is kept beside it, and mistakes that touch nothing."""
from __future__ import annotations

import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from EDM.dataset_tool import main
from EDM.tdsm.transition import asym_targets, load_transition, transition_matrix
from EDM.training.dataset import open_training_set
from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.images import ImageSet, read_images
from shared.data.writers import write_folder, write_npz
from tests.golden.data_sources import add_to_tar
from tests.shared.programs import ROOT, one_line_error, run


def source(folder: Path, count: int = 600, classes: int = 6, unlabelled: int = 0) -> Path:
    labels = np.arange(count) % classes
    labels[:unlabelled] = -1
    images = np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4), np.uint8)
    write_npz(ImageSet(images, labels, tuple(map(str, range(classes))), ""), folder / "clean.npz")
    return folder / "clean.npz"


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def content(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dataset.json"))


def test_noisy_labels_are_what_readers_see_and_the_clean_ones_are_kept(tmp_path, capsys):
    clean = source(tmp_path)
    convert("--source", clean, "--dest", tmp_path / "noisy.zip", "--noise_type=sym", "--noise_rate=0.4", "--seed=7")
    said, found = capsys.readouterr().out, content(tmp_path / "noisy.zip")
    noisy, before = open_training_set(tmp_path / "noisy.zip", use_labels=True).raw_labels, read_images(clean)
    np.testing.assert_array_equal([label for _, label in found["clean_labels"]], before.labels)
    np.testing.assert_array_equal(read_images(tmp_path / "noisy.zip").images, before.images)
    changed = noisy != before.labels
    assert len(found["flips"]) == changed.sum() == found["label_noise"]["flipped"]
    assert abs(changed.mean() - 0.4) < 0.08
    np.testing.assert_allclose(found["transition_matrix"], transition_matrix("sym", 0.4, 6))
    realised = np.array(found["realised_transition_matrix"])
    for row, column in np.ndindex(6, 6):
        assert realised[row, column] == (noisy[before.labels == row] == column).mean()
    assert f"{changed.sum()} of 600 labels flipped" in said and "realised transition matrix" in said
    assert f"{100 * realised[0, 0]:.1f}" in said


def test_seeds_repeat_and_differ(tmp_path):
    clean = source(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert("--source", clean, "--dest", tmp_path / f"{name}.zip", "--noise_type=sym", "--noise_rate=0.3",
                f"--seed={seed}")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert content(tmp_path / "a.zip")["labels"] != content(tmp_path / "c.zip")["labels"]


def test_a_matrix_of_ones_own_flips_by_its_rows(tmp_path):
    matrix = np.array([[0.5, 0.5, 0], [0, 1, 0], [0.2, 0, 0.8]])
    (tmp_path / "t.json").write_text(json.dumps(matrix.tolist()))
    clean = source(tmp_path, 1500, 3)
    convert("--source", clean, "--dest", tmp_path / "noisy.zip", "--transition", tmp_path / "t.json")
    found = content(tmp_path / "noisy.zip")
    realised = np.array(found["realised_transition_matrix"])
    assert (realised[matrix == 0] == 0).all() and np.abs(realised - matrix).max() < 0.08
    # What the tool wrote is a matrix file again, for training with what was really flipped.
    (tmp_path / "dataset.json").write_text(json.dumps(found))
    np.testing.assert_array_equal(load_transition(tmp_path / "dataset.json", 3), matrix)


def test_any_labelled_source_and_folders_as_destination(tmp_path):
    write_folder(read_images(source(tmp_path, 60, 10)), tmp_path / "classes")
    convert("--source", tmp_path / "classes", "--dest", tmp_path / "noisy", "--noise_type=asym", "--noise_rate=0.5",
            "--dataset=digits")
    found = json.loads((tmp_path / "noisy" / "dataset.json").read_text())
    assert {clean for _, clean, _ in found["flips"]} <= {2, 3, 5, 6}
    assert {(clean, noisy) for _, clean, noisy in found["flips"]} <= {(2, 7), (3, 8), (5, 6), (6, 5)}


def test_cifar100_is_read_from_its_archive_by_fine_labels(tmp_path):
    labels = np.arange(200) % 100
    batch = {"data": np.zeros((200, 3072), np.uint8), "fine_labels": labels.tolist(), "coarse_labels": [0] * 200}
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        add_to_tar(archive, "cifar-100-python/train", pickle.dumps(batch))
        add_to_tar(archive, "cifar-100-python/test", pickle.dumps({**batch, "fine_labels": labels[::-1].tolist()}))
    with pytest.warns(UserWarning, match="200 images in place of"):
        convert("--source", tmp_path / "cifar-100-python.tar.gz", "--dest", tmp_path / "a.zip", "--noise_type=asym",
                "--noise_rate=0.5")
        convert("--source", tmp_path / "cifar-100-python.tar.gz", "--dest", tmp_path / "b.zip", "--eval=1")
    targets = asym_targets("cifar100")  # by the archive, whatever --dest is called
    assert all(noisy == targets[clean] for _, clean, noisy in content(tmp_path / "a.zip")["flips"])
    assert len(content(tmp_path / "a.zip")["flips"]) > 50
    assert read_images(tmp_path / "b.zip").labels.tolist() == labels[::-1].tolist()


def test_without_noise_nothing_is_added(tmp_path):
    convert("--source", source(tmp_path), "--dest", tmp_path / "mnist.zip")
    assert list(content(tmp_path / "mnist.zip")) == ["labels"]


@pytest.mark.parametrize("flags, message", [
    (("--noise_type=sym",), "--noise_rate"),
    (("--noise_type=sym", "--noise_rate=1"), "1.0 is not in the range 0<=x<1"),
    (("--noise_type=sym", "--noise_rate=-0.1"), "-0.1 is not in the range 0<=x<1"),
    (("--noise_type=sym", "--noise_rate=nan"), "nan is not a finite number"),
    (("--noise_rate=0.4",), "add --noise_type"),
    (("--seed=3",), "add --noise_type"),
    (("--noise_type=asym", "--noise_rate=0.4"), "transition matrix as a file"),
    (("--noise_type=asym", "--noise_rate=0.4", "--dataset=cifar"), 'did you mean "cifar'),
    (("--noise_type=sym", "--noise_rate=0.4", "--transition=t.json"), "leave out"),
    (("--transition=absent.json",), "absent.json"),
    (("--transition=three.json",), "has 3 classes"),
    (("--transition=rows.json",), "sums to 0.9"),
    (("--transition=wide.json",), "square"),
    (("--eval=1",), "--eval"),
])
def test_mistakes_end_in_one_line_and_write_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source(tmp_path)
    for name, rows in (("three", np.eye(3).tolist()), ("rows", (np.eye(6) * 0.9).tolist()), ("wide", [[0.5, 0.5]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    with pytest.raises(UserError) as raised:
        convert("--source=clean.npz", "--dest=out/noisy.zip", *flags)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "noisy.zip").exists()


def test_images_without_label_cannot_be_flipped(tmp_path):
    with pytest.raises(UserError, match="a class number for every image"):
        convert("--source", source(tmp_path, unlabelled=3), "--dest", tmp_path / "out.zip", "--noise_type=sym",
                "--noise_rate=0.4")


def test_the_program_says_it_in_one_line_with_status_2(tmp_path):
    found = run("EDM/dataset_tool.py", "--source", source(tmp_path), "--dest", tmp_path / "out.zip",
                "--noise_type=sym", "--noise_rate=1.5", status=2, cwd=ROOT)
    assert "--noise_rate" in one_line_error(found)


def test_the_digits_need_no_file(tmp_path):
    convert("--source=digits", "--dest", tmp_path / "train.zip", "--noise_type=asym", "--noise_rate=0.5")
    convert("--source=digits", "--dest", tmp_path / "test.zip", "--eval=1")
    assert len(content(tmp_path / "train.zip")["clean_labels"]) == len(load_dataset("digits", "train"))
    np.testing.assert_array_equal(read_images(tmp_path / "test.zip").images, load_dataset("digits", "test").images)
