"""Programs between the stages: the same call again does nothing; another input or setting is named, and replaces the
output only with --overwrite. One case for every program and everything that it depends on."""
from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.writers import write_folder
from shared.training.fingerprint import fingerprint
from tests.torchssl import tiny
from TorchSSL import estimate_transition, get_labels, pseudo_dataset, pseudo_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of one's own, a classifier trained on them and its pseudo-labels."""
    folder = tmp_path_factory.mktemp("finished")
    for part in ("train", "test"):
        write_folder(load_dataset("digits", part).subset(slice(0, 60)), folder / "mine" / part)
    tiny.run(folder, "--dataset=mine")
    shutil.move(folder / "saved_models" / "tiny", folder / "run")
    call(folder, *PROGRAMS["get_labels"][:2])
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def call(place: Path, main: Callable[[], None], flags: str, *more: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["program.py", *flags.split(), *more])
        main()


def other_image(place: Path) -> None:
    first, second = sorted((place / "mine" / "train").rglob("*.png"))[:2]
    first.write_bytes(second.read_bytes())


def other_weights(place: Path) -> None:
    content = torch.load(place / "run" / "latest_model.pth", weights_only=False)
    next(iter(content["ema_model"].values())).view(-1)[0] += 1
    torch.save(content, place / "run" / "latest_model.pth")


def other_labels(place: Path) -> None:
    labels = np.load(place / "run" / "pseudo_label.npy")
    labels[0] = (labels[0] + 1) % 10
    np.save(place / "run" / "pseudo_label.npy", labels)


def other_index(place: Path) -> None:
    np.save(place / "run" / "sampled_label_idx.npy", np.load(place / "run" / "sampled_label_idx.npy")[:-1])


CLASSIFIER = "--load_path=run/latest_model.pth --save_path=run --dataset=mine"
# main, flags, output, [what changes: in the folder, or a flag; how the error names it]
PROGRAMS = {
    "get_labels": (get_labels.main, f"{CLASSIFIER} --label_idx=run/sampled_label_idx.npy", "run/pseudo_label.npy", [
        (other_image, "--dataset"), (other_weights, "--load_path"), (other_index, "--label_idx"),
        ("--use_train_model", "use_train_model was False, is True")]),
    "pseudo_dataset": (pseudo_dataset.main, "--save_path=run --dataset=mine", "run/run-pseudo.npz", [
        (other_image, "--dataset"), (other_labels, "pseudo_label.npy")]),
    "pseudo_folder": (pseudo_folder.main, "--labels=run/pseudo_label.npy --dataset=mine --dest=real --per_class=3",
                      "real/real_balanced", [
        (other_image, "--dataset"), (other_labels, "--labels"), ("--per_class=4", "per_class was 3, is 4")]),
    "estimate_transition": (estimate_transition.main, f"{CLASSIFIER} --views=2", "run/transition.json", [
        (other_image, "--dataset"), (other_weights, "--load_path"), (other_labels, "pseudo_label.npy"),
        ("--views=3", "views was 2, is 3"), ("--seed=1", "seed was 0, is 1")]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_call_again_does_nothing(place: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    main, flags, output, _ = PROGRAMS[name]
    call(place, main, flags)
    before, made = fingerprint(place / output), (place / output).stat()
    moved = place.rename(place.with_name("elsewhere"))
    capsys.readouterr()
    call(moved, main, flags)
    assert f"complete: {output}" in capsys.readouterr().out
    assert fingerprint(moved / output) == before and (moved / output).stat().st_mtime_ns == made.st_mtime_ns


@pytest.mark.parametrize("name, change, said", [
    pytest.param(name, change, said, id=f"{name}-{said.split()[0]}")
    for name, (*_, changes) in PROGRAMS.items() for change, said in changes])
def test_a_change_is_named_and_replaces_on_request(place: Path, name: str, change: Callable[[Path], None] | str,
                                                   said: str) -> None:
    main, flags, output, _ = PROGRAMS[name]
    call(place, main, flags)
    before, more = fingerprint(place / output), []
    if isinstance(change, str):
        more = [change]
    else:
        change(place)
    with pytest.raises(UserError, match=f"{said}.* --overwrite"):
        call(place, main, flags, *more)
    assert fingerprint(place / output) == before
    call(place, main, flags, *more, "--overwrite")
    call(place, main, flags, *more)
