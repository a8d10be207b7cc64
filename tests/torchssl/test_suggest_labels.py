"""suggest_labels.py: each strategy against a plain reference, and what becomes of its files."""
from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.images import read_images
from tests.torchssl.test_predict import CHROMIUM, all_pictures_shown
from tests.torchssl.tiny import call
from TorchSSL.encoders.images import features_in, training_images
from TorchSSL.suggest_labels import badge, coverage, entropy, main, margin, pure_radius, typical


@pytest.fixture
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Four groups of points in the plane, of 30, 25, 20 and 3: (rows, groups)."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(4), (30, 25, 20, 3))
    return (rng.normal(0, 0.3, (len(groups), 2)) + 10 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[groups]), groups


def distances(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[:, None] - rows[None], axis=2)


def test_typical_takes_the_densest_of_every_cluster_that_has_no_label(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    rows, groups = blobs
    found = typical(rows, groups, np.array([], np.int64), 4, 5)
    assert groups[found.positions].tolist() == [0, 1, 2, 0]  # by size; a group of three counts as outliers
    for group, position, score in zip(range(3), found.positions, found.scores, strict=False):
        inside = np.flatnonzero(groups == group)
        nearest = np.sort(distances(rows[inside]), axis=1)[:, 1:6].mean(1)
        assert position == inside[nearest.argmin()] and score == pytest.approx(1 / (nearest.min() + 1e-5))
    again = typical(rows, groups, found.positions[:1], 2, 5)
    assert groups[again.positions].tolist() == [1, 2]
    many = typical(rows, groups, np.array([], np.int64), len(rows), 5)
    assert sorted(many.positions) == list(range(len(rows)))


def test_coverage_is_the_greedy_cover(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    rows, groups = blobs
    delta = 0.4
    balls, covered, expected, scores = distances(rows) <= delta, np.zeros(len(rows), bool), [], []
    covered |= balls[3]  # which has a label
    for _ in range(6):
        gains = (balls & ~covered).sum(1)
        expected.append(int(gains.argmax()))
        scores.append(int(gains.max()))
        covered |= balls[expected[-1]]
    found = coverage(rows, np.array([3]), 6, delta)
    assert found.positions.tolist() == expected and found.scores.tolist() == scores
    assert 3 not in coverage(rows, np.array([3]), len(rows) - 1, delta).positions
    radius = pure_radius(rows, groups)
    pure = [set(groups[row <= radius]) == {group} for row, group in zip(distances(rows), groups, strict=True)]
    assert np.mean(pure) >= 0.9 and radius > 7


def test_strategies_with_a_classifier() -> None:
    rng = np.random.default_rng(1)
    rows, logits = rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    first, second = np.sort(probabilities, axis=1)[:, ::-1][:, :2].T
    assert np.allclose(margin(probabilities), first - second)
    assert entropy(np.full((1, 4), 0.25))[0] == pytest.approx(np.log(4)) and entropy(np.eye(4))[0] == 0

    gradients = np.stack([np.outer(p - np.eye(3)[p.argmax()], row).ravel()
                          for p, row in zip(probabilities, rows, strict=True)])
    free = np.arange(5, 40)
    found, norms = badge(probabilities, rows, free, 30, np.random.default_rng(0))
    assert np.allclose(norms, np.linalg.norm(gradients, axis=1)) and found[0] == free[norms[free].argmax()]
    assert set(found) <= set(free) and len(set(found)) == 30
    # k-means++ with the gradients themselves and the same draws.
    draws, expected = np.random.default_rng(0), [int(found[0])]
    for _ in range(29):
        squared = (np.linalg.norm(gradients[free][:, None] - gradients[expected][None], axis=2) ** 2).min(1)
        squared[np.isin(free, expected)] = 0
        expected.append(int(draws.choice(free, p=squared / squared.sum())))
    assert found.tolist() == expected


def test_the_digits_from_suggestion_to_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "typical"
    command = ["--dataset=digits", "--budget=10", f"--save_path={out}"]
    main(command)
    with open(out / "label_these.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "cluster", "rank", "score", "label"]
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 11)]
    assert len({row["cluster"] for row in rows}) == 10
    index = np.load(out / "sampled_label_idx.npy")
    assert index.dtype == np.int64 and index.tolist() == [int(row["file"]) for row in rows]
    # A random ten covers 6.5 classes.
    assert len(np.unique(load_dataset("digits", "train").labels[index])) >= 8
    assert Image.open(out / "contact_sheet.png").size[0] > 900
    page = (out / "label_these.html").read_text()
    assert page.count("<figure>") == 10 and (CHROMIUM is None or all_pictures_shown(page, tmp_path))

    capsys.readouterr()
    main(command)
    assert capsys.readouterr().out.startswith("complete: ")
    with pytest.raises(UserError, match="strategy was typical, is random.*--overwrite"):
        main([*command, "--strategy=random"])
    call(f"--save_dir={tmp_path}", f"--label_idx={out}/sampled_label_idx.npy", "--num_labels=10")
    assert np.array_equal(np.load(tmp_path / "tiny" / "sampled_label_idx.npy"), index)

    # With its classifier, the next ten.
    for strategy in ("margin", "entropy", "badge"):
        main([f"--load_path={tmp_path}/tiny/latest_model.pth", f"--labeled={out}/sampled_label_idx.npy",
              f"--strategy={strategy}", f"--save_path={tmp_path / strategy}"])
        both = np.load(tmp_path / strategy / "sampled_label_idx.npy")
        assert len(np.unique(both)) == 20 and both[:10].tolist() == sorted(index)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Twelve photographs of three colours and of different sizes, none with a label."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 60, (70 + number, 90, 3), np.uint8)
        pixels[..., number % 3] += 150
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def test_a_filled_in_list_makes_a_data_set_and_is_never_replaced(photographs: Path, tmp_path: Path) -> None:
    rows = np.array([np.asarray(Image.open(file)).mean((0, 1)) for file in sorted(photographs.iterdir())])
    np.save(tmp_path / "colours.npy", rows.astype(np.float32))
    out, names = tmp_path / "out", ("red", "green", "blue")
    common = [f"--dataset={photographs}", f"--features={tmp_path}/colours.npy"]
    main([*common, "--budget=3", f"--save_path={out}"])
    assert not (out / "sampled_label_idx.npy").exists()  # no label is known
    with open(out / "label_these.csv", newline="") as file:
        chosen = list(csv.DictReader(file))
    for row in chosen:
        row["label"] = names[int(row["file"][:2]) % 3]
    assert {row["label"] for row in chosen} == set(names)
    with open(out / "label_these.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, chosen[0])
        writer.writeheader()
        writer.writerows(chosen)
    filled = (out / "label_these.csv").read_text()

    main([*common, "--budget=3", f"--save_path={out}"])
    with pytest.raises(UserError, match="label_these.csv holds labels; .*--labeled"):
        main([*common, "--budget=5", "--overwrite", f"--save_path={out}"])
    assert (out / "label_these.csv").read_text() == filled

    # Beside or inside the folder of the images it is their labels.
    (photographs / "label_these.csv").write_text(filled)
    for file in photographs.glob("*.png"):
        Image.open(file).resize((8, 8)).save(file)
    with pytest.warns(UserWarning, match="9 of 12 images have no label"):
        images = read_images(photographs)
    assert images.classes == ("blue", "green", "red") and Counter(images.labels.tolist()) == {-1: 9, 0: 1, 1: 1, 2: 1}

    # They are not suggested again, whether they are found there or given.
    main([*common, "--budget=4", f"--save_path={tmp_path}/found"])
    (photographs / "label_these.csv").unlink()
    main([*common, "--budget=4", f"--labeled={out}/label_these.csv", f"--save_path={tmp_path}/given"])
    with open(tmp_path / "found" / "label_these.csv", newline="") as file:
        next_ones = {row["file"] for row in csv.DictReader(file)}
    assert len(next_ones) == 4 and not next_ones & {row["file"] for row in chosen}
    assert (tmp_path / "found/label_these.csv").read_text() == (tmp_path / "given/label_these.csv").read_text()


def test_mistakes_are_one_line(photographs: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "nan.npy", np.full((12, 2), np.nan, np.float32))
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    (tmp_path / "other.csv").write_text("file,label\nx.png,red\n")
    own, digits = f"--dataset={photographs}", "--dataset=digits"
    for words, message in (
            ([own], "photographs are not compared by their pixels; give --encoder"),
            ([], "--dataset: expected the images to choose from"),
            ([digits, "--strategy=badge"], "--strategy badge needs the classifier --load_path"),
            ([digits, "--features=a", "--encoder=b"], "--features and --encoder: give one of them"),
            ([digits, "--budget=2000"], "--budget 2000: only 1297 images have no label yet"),
            ([own, f"--features={tmp_path}/short.npy"], r"expected floats \[12, D\]"),
            ([own, f"--features={tmp_path}/nan.npy"], "--features: the features of .* are not finite"),
            ([own, f"--features={tmp_path}/two.npz"], "holds a, b; expected `features`"),
            ([own, f"--labeled={tmp_path}/other.csv"], "names x.png, which is not among the images"),
            ([digits, f"--labeled={tmp_path}/nan.npy"], "must hold positions in 0..1296"),
            ([f"--dataset={tmp_path}/none"], "neither a data set|no such")):
        with pytest.raises(UserError, match=message) as error:
            main([*words, f"--save_path={tmp_path}/out"])
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("label_these*"))


def test_features_of_an_encoder_are_found_by_name(photographs: Path, tmp_path: Path) -> None:
    names = [f"{number:02d}.png" for number in reversed(range(12))]
    rows = torch.tensor([[number + 1.0, 1.0] for number in reversed(range(12))])
    torch.save({"embs": rows, "labs": torch.full((12,), -1), "fnames": names}, tmp_path / "features.pth")
    found = features_in(str(tmp_path / "features.pth"), training_images(str(photographs)))
    assert np.allclose(found[:, 0] / found[:, 1], np.arange(1, 13)) and np.allclose((found ** 2).sum(1), 1)
