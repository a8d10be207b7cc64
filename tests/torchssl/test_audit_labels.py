"""audit_labels.py: what is found on planted errors, that every opinion is out of sample, and what is written."""
from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from EDM import dataset_tool
from EDM.tdsm.noise import clean_labels
from EDM.tdsm.transition import load_transition
from shared.cli import UserError
from shared.data.images import ImageSet, read_images
from shared.data.writers import write_folder
from tests.torchssl.test_predict import CHROMIUM, all_pictures_shown
from TorchSSL import audit_labels
from TorchSSL.audit import diffusion, findings
from TorchSSL.audit.folds import linear_judge, out_of_sample
from TorchSSL.core.labels import compared_with_truth

CLASSES = ("cat", "dog", "owl")


def planted(rate: float = 0.3, count: int = 900, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (true labels, given labels, probabilities near the truth): a dog is called an owl at a rate."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=count)
    given = np.where((truth == 1) & (rng.random(count) < rate), 2, truth)
    probabilities = 0.9 * np.eye(3)[truth] + 0.1 / 3
    return truth, given, probabilities


# ---------------------------------------------------------------- findings

@pytest.mark.parametrize("rank", ["self_confidence", "normalized_margin"])
def test_planted_errors_are_found_worst_first_and_unlabelled_images_are_none(rank: str) -> None:
    truth, given, probabilities = planted()
    given[:50] = -1
    found = findings.label_issues(given, probabilities, rank)
    assert set(found.positions) == set(np.flatnonzero((given >= 0) & (given != truth)))
    assert (found.suggested[found.positions] == truth[found.positions]).all()
    assert (np.diff(found.quality[found.positions]) >= 0).all()


def test_the_transition_matrix_is_that_of_the_noise_and_tdsm_reads_it(tmp_path: Path) -> None:
    truth, given, probabilities = planted()
    matrix = findings.transition_matrix(given, probabilities)
    np.testing.assert_allclose(matrix, compared_with_truth(matrix, truth, given)["true_transition_matrix"], atol=0.01)
    (tmp_path / "t.json").write_text(json.dumps({"transition_matrix": matrix.tolist()}))
    np.testing.assert_allclose(load_transition(tmp_path / "t.json", 3), matrix)
    assert matrix.min() > 0


def test_duplicates_near_duplicates_outliers_and_images_of_the_test_set() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 20)).astype(np.float32)
    rows[10] = rows[3]
    rows[20] = rows[4] + 0.01
    rows[30] = 40
    found = findings.neighbours(rows)
    assert [pair[:2] for pair in found.duplicates] == [(3, 10), (4, 20)] and found.duplicates[0][2] == 0
    assert [position for position, _ in found.outliers] == [30]
    test = np.random.default_rng(1).normal(size=(50, 20)).astype(np.float32)
    test[7] = rows[5] + 0.01
    assert [pair[:2] for pair in findings.across(rows, test, found.radius)] == [(5, 7)]


def test_classes_that_share_images_overlap() -> None:
    _, given, probabilities = planted()
    found = findings.overlapping(given, probabilities, CLASSES)
    assert {found[0]["one"], found[0]["other"]} == {"dog", "owl"}


def test_given_probabilities_in_every_form(tmp_path: Path) -> None:
    names, expected = ["a.png", "b.png"], np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    np.save(tmp_path / "p.npy", expected)
    np.savez(tmp_path / "p.npz", pred_probs=expected)
    (tmp_path / "p.csv").write_text("file,owl,cat,dog\nb.png,0,0,1\na.png,0.25,0.5,0.25\n")
    for ending in ("npy", "npz", "csv"):
        np.testing.assert_array_equal(findings.given_probabilities(str(tmp_path / f"p.{ending}"), names, CLASSES),
                                      expected)


@pytest.mark.parametrize("name, content, words", [
    ("no.npy", None, "there is no file"),
    ("a.npy", np.ones((2, 2)), "expected floats [2, 3]"),
    ("a.npy", np.ones((2, 3)), "no distribution"),
    ("a.npy", np.full((2, 3), np.nan), "no distribution"),
    ("a.npz", {"x": np.ones((2, 3)), "y": np.ones(1)}, "expected `probabilities`"),
    ("a.csv", "file,cat,dog\na.png,0,1\n", "needs the columns file, cat, dog, owl"),
    ("a.csv", "file,cat,dog,owl\na.png,0,1,0\n", "no row for b.png"),
    ("a.csv", "file,cat,dog,owl\na.png,0,one,0\n", "needs the columns"),
])
def test_unfit_probabilities_are_one_line(name: str, content: object, words: str, tmp_path: Path) -> None:
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        findings.given_probabilities(str(tmp_path / name), ["a.png", "b.png"], CLASSES)
    assert words in str(caught.value) and "--pred_probs" in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- out of sample

def test_every_image_is_judged_by_classifiers_that_have_not_seen_it(tmp_path: Path) -> None:
    labels = np.array([0, 1] * 10 + [-1, -1])
    seen: list[tuple[set, set]] = []

    def judge(learned: np.ndarray, judged: np.ndarray, fold: int) -> np.ndarray:
        seen.append((set(learned), set(judged)))
        return np.tile([0.25, 0.75], (len(judged), 1))

    options = SimpleNamespace(folds=5, seed=0, overwrite=False)
    first = out_of_sample(labels, 2, judge, options, tmp_path, {}, {})
    assert all(not learned & judged and not {20, 21} & learned and {20, 21} <= judged for learned, judged in seen)
    assert set().union(*(judged for _, judged in seen)) == set(range(22)) and len(seen) == 5
    np.testing.assert_allclose(first, np.tile([0.25, 0.75], (22, 1)))
    (tmp_path / "fold_3.npy").unlink()
    np.testing.assert_array_equal(out_of_sample(labels, 2, judge, options, tmp_path, {}, {}), first)
    assert len(seen) == 6  # one fold was made again


def test_linear_classifiers_leave_out_classes_that_a_fold_lacks() -> None:
    features = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    labels = np.array([0] * 10 + [2] * 10)
    found = linear_judge(features, labels, 3)(np.arange(20), np.arange(5), 0)
    assert found.shape == (5, 3) and (found[:, 1] == 0).all()
    np.testing.assert_allclose(found.sum(1), 1)


# ---------------------------------------------------------------- the diffusion classifier

class Means(torch.nn.Module):
    """A denoiser that returns the mean image of the class."""

    def __init__(self, means: torch.Tensor) -> None:
        super().__init__()
        self.means, self.label_dim, self.inputs = means, len(means), []

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        return self.means[class_labels.argmax(1)]


def test_the_diffusion_classifier_prefers_the_class_that_denoises_best() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=30)
    levels = np.array([40, 120, 220])
    images = (levels[truth][:, None, None, None] + rng.integers(-20, 20, (30, 1, 8, 8))).astype(np.uint8)
    net = Means(torch.from_numpy(levels / 127.5 - 1).float()[:, None, None, None].expand(3, 1, 8, 8))
    errors = diffusion.denoising_errors(net, images, np.arange(3), 4, 0, torch.device("cpu"))
    assert (errors.argmin(1) == truth).all()
    first = net.inputs[0].view(-1, 3, 1, 8, 8)
    assert torch.equal(first[:, 0], first[:, 1])  # the same draws for all classes
    swapped = diffusion.denoising_errors(net, images, np.array([2, 0, 1]), 4, 0, torch.device("cpu"))
    np.testing.assert_allclose(swapped, errors[:, [2, 0, 1]], rtol=1e-5)
    given = truth.copy()
    given[:3] = (given[:3] + 1) % 3
    probabilities = diffusion.class_probabilities(errors, given)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (probabilities.argmax(1) == truth).all()
    # The temperature fits the labels, of which nine of ten are as the model says.
    assert 0.7 < probabilities[np.arange(30), truth].mean() < 0.98
    one, other = np.array([[0.8, 0.2]]), np.array([[0.2, 0.8]])
    np.testing.assert_allclose(diffusion.combined(one, other), [[0.5, 0.5]])


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noisy")
    dataset_tool.main(["--source=digits", f"--dest={folder / 'set.zip'}", "--noise_type=sym", "--noise_rate=0.2",
                       "--max-images=300"])
    return folder / "set.zip"


def pixels(path: Path) -> np.ndarray:
    images = read_images(path).images
    return images.reshape(len(images), -1) / np.float32(255)


def test_the_digits_are_audited_again_from_where_it_stopped_and_corrected(
        noisy: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, command = tmp_path / "audit", [f"--dataset={noisy}", f"--save_path={tmp_path / 'audit'}", "--folds=2",
                                           "--num_train_iter=60", "--batch_size=32", "--lr=0.05",
                                           f"--apply={tmp_path / 'fixed.csv'}"]
    audit_labels.main(command)
    assert "by the truth that the set keeps" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "issues.csv").open()))
    issues = [row for row in rows if row["issue"] == "label"]
    images, truth = read_images(noisy), clean_labels(noisy)
    fixed = read_images(noisy, table=tmp_path / "fixed.csv").labels
    assert issues and np.count_nonzero(fixed != images.labels) == len(issues)
    assert np.mean(fixed == truth) > np.mean(images.labels == truth)
    assert [float(row["score"]) for row in issues] == sorted(float(row["score"]) for row in issues)
    assert load_transition(folder / "transition.json", 10).shape == (10, 10)
    summary = json.loads((folder / "audit.json").read_text())
    assert summary["wrong_labels"] == np.count_nonzero(images.labels != truth)
    page = folder / "audit.html"
    assert page.read_text().count("<figure>") >= min(12, len(issues))
    assert CHROMIUM is None or all_pictures_shown(page.read_text(), tmp_path)

    audit_labels.main(command)
    assert f"complete: {page}" in capsys.readouterr().out
    before = (folder / "probabilities.npz").read_bytes(), (folder / "fold_0.npy").stat().st_mtime_ns
    for name in ("audit.html", "fold_1.npy"):
        (folder / name).unlink()
    audit_labels.main(command)
    assert ((folder / "probabilities.npz").read_bytes(), (folder / "fold_0.npy").stat().st_mtime_ns) == before
    with pytest.raises(UserError, match="--overwrite"):
        audit_labels.main([*command, "--seed=2"])


def test_features_and_given_probabilities_take_the_place_of_training(noisy: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", pixels(noisy))
    audit_labels.main([f"--dataset={noisy}", f"--save_path={tmp_path / 'linear'}", "--folds=3",
                       f"--features={tmp_path / 'features.npy'}"])
    found = json.loads((tmp_path / "linear" / "audit.json").read_text())["known_truth"]["classifier"]
    assert found["precision"] > 0.5 and found["recall"] > 0.5
    audit_labels.main([f"--dataset={noisy}", f"--save_path={tmp_path / 'given'}",
                       f"--pred_probs={tmp_path / 'linear' / 'probabilities.npz'}"])
    assert (tmp_path / "given" / "issues.csv").read_text() == (tmp_path / "linear" / "issues.csv").read_text()


def test_own_classes_keep_their_names_and_a_json_holds_corrected_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    images = (60 + 120 * labels[:, None, None, None] + rng.integers(0, 40, (40, 3, 8, 8))).astype(np.uint8)
    labels[3] = 1
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = tmp_path / "mine" / ("cat", "dog")[label] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    order = np.argsort(labels, kind="stable")  # folder after folder
    np.save(tmp_path / "features.npy", images[order].reshape(40, -1).astype(np.float32))
    audit_labels.main([f"--dataset={tmp_path / 'mine'}", f"--save_path={tmp_path / 'out'}", "--folds=4",
                       f"--features={tmp_path / 'features.npy'}", f"--apply={tmp_path / 'dataset.json'}"])
    rows = [row for row in csv.DictReader((tmp_path / "out" / "issues.csv").open()) if row["issue"] == "label"]
    assert [(row["file"], row["given"], row["suggested"]) for row in rows] == [("dog/03.png", "dog", "cat")]
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert content["classes"] == ["cat", "dog"] and dict(content["labels"])[rows[0]["file"]] == 0


@pytest.mark.parametrize("flags, words", [
    (["--features=f.npy", "--encoder=timm:x"], "give one of them"),
    (["--pred_probs=no.npy"], "there is no file no.npy"),
    (["--diffusion=no.pkl"], "there is no file no.pkl"),
    (["--apply=fixed.txt"], "ending in .csv or .json"),
    (["--apply={noisy}"], "ending in .csv or .json"),
    (["--apply=there.csv"], "there.csv exists and was not written by this program"),
    (["--folds=500"], "has fewer labels"),
    (["--dataset=nothing"], "nothing"),
])
def test_bad_flags_are_one_line_and_nothing_is_touched(flags: list[str], words: str, noisy: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("mine")
    with pytest.raises(UserError) as caught:
        audit_labels.main([f"--dataset={noisy}", "--save_path=out", *(flag.format(noisy=noisy) for flag in flags)])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("out").exists() and Path("there.csv").read_text() == "mine"


def test_labels_are_never_corrected_in_place(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), np.uint8)
    write_folder(ImageSet(images, np.repeat([0, 1], 10), ("a", "b"), "mine"), tmp_path / "mine")
    with pytest.raises(UserError, match="stays as it is"):
        audit_labels.main([f"--dataset={tmp_path / 'mine'}", f"--save_path={tmp_path / 'out'}",
                           f"--apply={tmp_path / 'mine' / 'labels.csv'}"])
