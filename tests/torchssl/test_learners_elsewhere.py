"""Checkpoints that other programs wrote."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from shared.cli import UserError
from TorchSSL import eval as evaluation_script
from TorchSSL.core.classifier import open_classifier
from TorchSSL.core.data import NORMALISATION
from TorchSSL.core.networks import ResNet50, WideResNet, WideResNetVar

# Flags of eval.py -> network; the golden cases have those of the published depth. USB calls the four stages
# "WRN-Var-37-2", for their convolutions at depth 28: 1 + 4 * 8 + 4 shortcuts.
PUBLISHED = {
    "--depth=10": lambda: WideResNet(10, depth=10),
    "--depth=10 --net=WideResNetVar --dataset=stl10": lambda: WideResNetVar(10, depth=10, first_stride=2),
    "--net=ResNet50": lambda: ResNet50(10),
}


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
    for given in ({}, {name: getattr(options, name) for name in options.given & {"net", "depth"}}):
        found = open_classifier(tmp_path / "theirs.pth", dataset=options.dataset, given=given)
        for name, value in found.net.state_dict().items():
            assert torch.equal(value, saved[name]), name
        assert not found.net.training


def test_normalisation_of_a_usb_checkpoint(tmp_path: Path) -> None:
    """ImageNet's numbers on CIFAR-10; elsewhere TorchSSL's are taken, and that is said."""
    state = {name.replace("fc.", "classifier."): value
             for name, value in WideResNet(10, depth=10, widen_factor=1).state_dict().items()}
    torch.save({"ema_model": state}, tmp_path / "theirs.pth")
    found = open_classifier(tmp_path / "theirs.pth", dataset="cifar10")
    assert (found.mean, found.std) == NORMALISATION["imagenet"]
    with pytest.warns(UserWarning, match="USB"):
        assert open_classifier(tmp_path / "theirs.pth", dataset="svhn").mean == NORMALISATION["svhn"][0]


def test_flags_that_contradict_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"ema_model": WideResNet(10, depth=10, widen_factor=1).state_dict()}, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="the weights of another network .*; give --net, --depth"):
        open_classifier(tmp_path / "theirs.pth", dataset="cifar10", given={"depth": 16})


def test_networks_of_torchvision_by_their_flags(tmp_path: Path) -> None:
    """Also one whose names are like those of another paper's networks."""
    for name in ("shufflenet_v2_x0_5", "mobilenet_v3_small"):
        net = torchvision.models.get_model(name, num_classes=3)
        torch.save({"ema_model": net.state_dict()}, tmp_path / "theirs.pth")
        found = open_classifier(tmp_path / "theirs.pth", dataset="cifar10", given={"net": name, "net_from_name": True})
        assert type(found.network) is type(net) and len(found.classes) == 3


def test_rotation_head_of_a_checkpoint(tmp_path: Path) -> None:
    """A network that was trained with ReMixMatch evaluates like any other."""
    state = WideResNet(10, depth=10, widen_factor=1, rotation_head=True).state_dict()
    torch.save({"ema_model": state, "mean": (0.5,) * 3, "std": (0.2,) * 3}, tmp_path / "theirs.pth")
    assert open_classifier(tmp_path / "theirs.pth").network.rot_classifier is not None
