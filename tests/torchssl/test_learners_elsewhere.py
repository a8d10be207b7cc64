"""Checkpoints that other programs wrote."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared.data.datasets import load_dataset
from shared.data.images import ImageSet
from TorchSSL import eval as evaluation_script
from TorchSSL.core.data import NORMALISATION
from TorchSSL.core.evaluation import load_classifier
from TorchSSL.core.networks import ResNet50, WideResNet, WideResNetVar

# Flags of eval.py -> network; the golden cases have those of the published depth. USB calls the four stages
# "WRN-Var-37-2", for their convolutions at depth 28: 1 + 4 * 8 + 4 shortcuts.
PUBLISHED = {
    "--depth=10": lambda: WideResNet(10, depth=10),
    "--depth=10 --net=WideResNetVar --dataset=stl10": lambda: WideResNetVar(10, depth=10, first_stride=2),
    "--net=ResNet50": lambda: ResNet50(10),
}


def rgb(dataset: str = "cifar10") -> ImageSet:
    images = load_dataset("digits", "test")
    return ImageSet(images.images.repeat(3, 1), images.labels, images.classes, dataset)


@pytest.mark.parametrize(("key", "prefix", "head"), [
    ("ema_model", "module.", "fc."), ("eval_model", "", "fc."), ("ema_model", "", "classifier."),
    ("ema_model", "module.", "classifier.")], ids=["TorchSSL and DPT", "elder", "USB", "USB, data-parallel"])
@pytest.mark.parametrize("flags", PUBLISHED)
def test_foreign_checkpoints(flags: str, key: str, prefix: str, head: str, tmp_path: Path) -> None:
    """Those of DPT and TorchSSL, of its elder trainers, and of USB give the network that was saved."""
    with torch.device("meta"):
        names = PUBLISHED[flags]().state_dict()
    generator = torch.Generator().manual_seed(0)
    saved = {name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(7)
             for name, value in names.items()}
    torch.save({key: {prefix + name.replace("fc.", head, 1) if name.startswith("fc.") else prefix + name: value
                      for name, value in saved.items()}, "it": 3}, tmp_path / "theirs.pth")
    options = evaluation_script.parse(flags.split())
    found = load_classifier(str(tmp_path / "theirs.pth"), options, rgb())
    for name, value in found.net.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert not found.net.training


def test_normalisation_of_a_usb_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """ImageNet's numbers on CIFAR-10; elsewhere TorchSSL's are taken, and that is said."""
    state = {name.replace("fc.", "classifier."): value
             for name, value in WideResNet(10, depth=10, widen_factor=1).state_dict().items()}
    torch.save({"ema_model": state}, tmp_path / "theirs.pth")
    options = evaluation_script.parse(["--depth=10", "--widen_factor=1"])
    found = load_classifier(str(tmp_path / "theirs.pth"), options, rgb())
    assert (found.mean, found.std) == NORMALISATION["imagenet"] and not capsys.readouterr().err
    elsewhere = SimpleNamespace(**{**vars(options), "dataset": "svhn"})
    assert load_classifier(str(tmp_path / "theirs.pth"), elsewhere, rgb("svhn")).mean is None
    assert "USB" in capsys.readouterr().err


def test_rotation_head_of_a_checkpoint(tmp_path: Path) -> None:
    """A network that was trained with ReMixMatch evaluates like any other."""
    state = WideResNet(10, depth=10, widen_factor=1, rotation_head=True).state_dict()
    torch.save({"ema_model": state, "mean": (0.5,) * 3, "std": (0.2,) * 3}, tmp_path / "theirs.pth")
    options = evaluation_script.parse(["--depth=10", "--widen_factor=1"])
    assert load_classifier(str(tmp_path / "theirs.pth"), options, rgb()).net.rot_classifier is not None
