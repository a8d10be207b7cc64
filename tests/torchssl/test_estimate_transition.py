"""The estimate of how pseudo-labels err: known cases exactly, no label used that was not asked for, bad input."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.cli import UserError
from shared.data.datasets import load_dataset
from tests.torchssl import tiny
from TorchSSL import estimate_transition as estimate
from TorchSSL import get_labels
from TorchSSL.core import labels


def test_votes_are_summed_by_pseudo_label_and_rows_are_shares():
    votes = np.array([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0], [0.2, 0.8]])
    joint = estimate.joint_of_votes(votes, np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(joint, [[1.4, 0.2], [0.6, 1.8]])
    np.testing.assert_allclose(estimate.rows_of(joint, 0.0), [[0.875, 0.125], [0.25, 0.75]])
    np.testing.assert_allclose(estimate.rows_of(np.array([[2.0, 0], [0, 0]]), 0.1), [[0.95, 0.05], [0.05, 0.95]])
    assert labels.distance(np.eye(4), np.full((4, 4), 0.25)) == pytest.approx(0.75)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    tiny.run(folder)
    run = folder / "saved_models" / "tiny"
    call(get_labels.main, f"--load_path={run}/latest_model.pth", f"--save_path={run}")
    return run


def call(main, *arguments: object) -> None:
    before, sys.argv = sys.argv, ["program", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = before


def made(run: Path, *flags: str, dest: str = "transition.json") -> dict:
    call(estimate.main, f"--load_path={run}/latest_model.pth", f"--save_path={run}", f"--dest={dest}", "--overwrite",
         *flags)
    return json.loads((run / dest).read_text())


def test_the_estimate_is_a_transition_matrix_and_repeats(trained, capsys):
    found = made(trained, "--views=3")
    said = capsys.readouterr().out
    matrix = np.array(found["transition_matrix"])
    assert matrix.shape == (10, 10) and (matrix > 0).all()
    np.testing.assert_allclose(matrix.sum(1), 1)
    assert found == made(trained, "--views=3") and found != made(trained, "--views=3", "--seed=1")
    true = np.array(found["true_transition_matrix"])
    labels, pseudo = load_dataset("digits", "train").labels, np.load(trained / "pseudo_label.npy")
    assert true[3, 5] == pytest.approx(np.mean(pseudo[labels == 3] == 5))
    assert f"{found['error']:.3f}" in said and found["error"] == pytest.approx(np.abs(matrix - true).sum(1).mean() / 2)


def test_held_out_labels_bring_it_nearer_the_true_one(trained):
    without, few, many = made(trained), made(trained, "--method=held_out", "--held_out=50"), \
        made(trained, "--method=held_out", "--held_out=800")
    assert many["error"] < 0.1 and many["error"] < few["error"] < without["error"]
    assert few["held_out"] == 50


def held_out(run: Path, count: int) -> np.ndarray:
    options = estimate.parse(["--method=held_out", f"--held_out={count}", "--dataset=digits", f"--save_path={run}"])
    return estimate.held_out_index(options, load_dataset("digits", "train").labels, 10)


def test_the_training_labels_are_not_held_out(trained):
    index, labels = held_out(trained, 200), load_dataset("digits", "train").labels
    assert np.bincount(labels[index]).tolist() == [20] * 10
    assert not set(index.tolist()) & set(np.load(trained / "sampled_label_idx.npy").tolist())


def test_true_labels_beyond_those_held_out_take_no_part(trained, monkeypatch):
    before = made(trained, "--method=held_out", "--held_out=20")["transition_matrix"]
    kept, count = held_out(trained, 20), estimate.confusion_matrix

    def only_held_out(labels, pseudo, classes):
        return count(labels, pseudo, classes) if len(labels) == len(kept) else np.ones((classes, classes))

    monkeypatch.setattr(estimate, "confusion_matrix", only_held_out)
    assert made(trained, "--method=held_out", "--held_out=20")["transition_matrix"] == before


@pytest.mark.parametrize("flags, message", [
    (["--method=guess"], "not one of 'predictions', 'held_out'"),
    (["--method=held_out"], "needs one of --held_out N"),
    (["--held_out=20"], "needs one of --held_out N"),
    (["--method=held_out", "--held_out=15"], "not a multiple of the 10 classes"),
    (["--method=held_out", "--held_out=5000"], "has 126 labelled images besides"),
    (["--method=held_out", "--held_out_idx=sampled_label_idx.npy"], "was trained on image"),
    (["--save_path=."], "pseudo_label.npy"),
])
def test_mistakes_end_in_one_line(flags, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    if flags == ["--save_path=."]:
        monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        made(trained, *flags, dest="other.json")
    assert message in str(raised.value) and not (trained / "other.json").exists()


def test_pseudo_labels_of_another_set_are_refused(trained, tmp_path):
    np.save(tmp_path / "pseudo_label.npy", np.zeros(7, np.int64))
    with pytest.raises(UserError, match="expected 1297 labels from 0 to 9"):
        call(estimate.main, f"--load_path={trained}/latest_model.pth", f"--save_path={tmp_path}")
