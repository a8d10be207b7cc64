"""--pretrained: a run starts from the weights of a file, on images normalised as these expect."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.metasemi import tiny


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.call("train_baseline", "--total-steps=4")
    return (tmp_path / "run").rename(tmp_path / "before") / "checkpoint.pth"


def test_a_run_starts_from_these_weights(weights: Path) -> None:
    content = read_checkpoint(weights)
    torch.save({**content, "mean": (0.25,), "std": (0.5,)}, weights)
    tiny.call("train_meta", f"--pretrained={weights}", "--total-steps=1", "--lr=0", "--weight-decay=0")
    after = read_checkpoint("run/checkpoint.pth")
    parameters = [name for name in content["model"] if name.endswith(("weight", "bias"))]
    assert all(torch.equal(after["model"][name], content["model"][name]) for name in parameters)
    assert (after["mean"], after["std"]) == ((0.25,), (0.5,))
    assert f"--pretrained {weights}: " in Path("run/log.txt").read_text()


def test_other_classes_get_a_fresh_label_layer(weights: Path) -> None:
    content = read_checkpoint(weights)
    torch.save({**content, "classes": [f"other {number}" for number in range(10)]}, weights)
    tiny.call("train_meta", f"--pretrained={weights}", "--total-steps=1")
    assert "a fresh label layer" in Path("run/log.txt").read_text()


def test_other_weights_are_another_input(weights: Path) -> None:
    tiny.call("train_meta", f"--pretrained={weights}", "--total-steps=1")
    content = read_checkpoint(weights)
    torch.save({**content, "model": {name: tensor + 1 for name, tensor in content["model"].items()}}, weights)
    with pytest.raises(UserError, match="--pretrained"):
        tiny.call("train_meta", f"--pretrained={weights}", "--total-steps=1")
    tiny.call("train_meta", f"--pretrained={weights}", "--total-steps=1", "--overwrite")


@pytest.mark.parametrize(("flags", "words"), [
    (["--pretrained=absent.pth"], "there is no file absent.pth"),
    (["--pretrained={weights}", "--resume={weights}"], "give one of them"),
])
def test_bad_weights_are_one_line(weights: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.call("train_meta", *(flag.format(weights=weights) for flag in flags))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("run").exists()
