"""The t-SNE figure: same files for the same seed, images in their order, and what does not fit."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from MetaSemi import plot_features
from MetaSemi.core.data import NORMALISATION
from shared.augment.views import normalise
from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.writers import write_folder
from tests.metasemi import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny.run(folder, "--total-steps=4")
    return folder / "run"


def plot(trained: Path, out: Path, *extra: str) -> Path:
    before = sys.argv
    sys.argv = ["plot_features.py", "--dataset=digits", f"--checkpoint-path={trained / 'model_best.pth'}",
                f"--index-path={trained / 'label_indices.txt'}", f"--save-path={out}", *extra]
    try:
        plot_features.main()
    finally:
        sys.argv = before
    return out


def test_same_seed_same_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("aligned.npy", "classes.npy", "visualization.pdf", "visualization.png")
    one, two = (plot(trained, tmp_path / name, "--num-point=30") for name in "ab")
    other = plot(trained, tmp_path / "c", "--num-point=30", "--seed=1")
    assert "# data: 1297, labeled: 20, unlabeled: 1277" in capsys.readouterr().out
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (one / "visualization.png").read_bytes() != (other / "visualization.png").read_bytes()
    assert (one / "visualization.pdf").read_bytes().startswith(b"%PDF")
    aligned, classes = np.load(one / "aligned.npy"), np.load(one / "classes.npy")
    assert aligned.shape == (80, 2) and aligned.dtype == np.float32
    labeled = np.loadtxt(trained / "label_indices.txt", dtype=int)
    np.testing.assert_array_equal(classes[:20], load_dataset("digits", "train").labels[labeled])


def test_embedding_of_all(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is labelled, unlabelled, test; the choice comes after the embedding."""
    drawn = []
    monkeypatch.setattr(plot_features, "embed", lambda vectors, seed: vectors[:, :2].copy())
    monkeypatch.setattr(plot_features, "draw", lambda panels, folder: drawn.extend(panels))
    out = plot(trained, tmp_path / "all", "--embed-all", "--num-point=7")
    assert [len(places) for places, _ in drawn] == [20, 7, 7]
    train, test = (load_dataset("digits", part) for part in ("train", "test"))
    labeled = np.loadtxt(trained / "label_indices.txt", dtype=int)
    order = np.concatenate([labeled, np.setdiff1d(np.arange(len(train)), labeled)])
    np.testing.assert_array_equal(np.load(out / "classes.npy"), np.concatenate([train.labels[order], test.labels]))
    net = plot_features.load_network(str(trained / "model_best.pth"), 1)
    with torch.no_grad():
        wanted = net.features(normalise(torch.from_numpy(test.images[:5].copy()), *NORMALISATION["digits"]))
    np.testing.assert_allclose(np.load(out / "aligned.npy")[len(train):][:5], wanted[:, :2], rtol=1e-5, atol=1e-6)


def test_own_images_by_the_names_of_their_classes(tmp_path: Path) -> None:
    """The test set lacks a class, and a further set numbers the classes of the checkpoint otherwise."""
    digits = load_dataset("digits", "train").subset(slice(0, 150))
    for split, missing in (("train", 10), ("test", 4)):
        write_folder(digits.subset(np.flatnonzero(digits.labels != missing)), tmp_path / "own" / split)
        for folder in (tmp_path / "own" / split).iterdir():
            folder.rename(folder.with_name(f"digit {folder.name}"))
    tiny.run(tmp_path, "--dataset=own", "--total-steps=4")
    with pytest.warns(UserWarning, match="no image of class digit 4"):
        plot(tmp_path / "run", tmp_path / "out", f"--dataset={tmp_path / 'own'}", "--num-point=40")
    classes = np.load(tmp_path / "out" / "classes.npy")
    assert set(classes[:20]) == set(range(10)) and 4 not in classes[60:]
    for split in ("train", "test"):
        (tmp_path / "own" / split / "digit 0").rename(tmp_path / "own" / split / "zero")
    with pytest.raises(UserError, match="the class 'zero' is not one of the training set's classes"):
        plot(tmp_path / "run", tmp_path / "out", f"--dataset={tmp_path / 'own'}")


@pytest.mark.parametrize("content, words", [("", "is empty"), ("3\n4\nfive\n", "found 'five'"), ("1\n-2\n", "'-2'"),
                                            ("99999\n", "from 0 to 1296"), ("5\n5\n", "twice")])
def test_wrong_index_files(content: str, words: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "indices.txt").write_text(content)
    with pytest.raises(UserError, match=words):
        plot(trained, tmp_path / "out", f"--index-path={tmp_path / 'indices.txt'}")
    assert not (tmp_path / "out").exists()


def test_wrong_checkpoints(trained: Path, tmp_path: Path) -> None:
    torch.save({"weights": 1}, tmp_path / "a.pth")
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, tmp_path / "b.pth")
    for name, words in (("a", "holds no model"), ("b", "does not fit ResNet32x32"), ("c", "no such checkpoint")):
        with pytest.raises(UserError, match=words):
            plot(trained, tmp_path / "out", f"--checkpoint-path={tmp_path / name}.pth")
