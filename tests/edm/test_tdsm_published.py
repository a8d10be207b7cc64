"""Classifier snapshots in the published form: rebuilt without running what they bring along, with their label noise."""
from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from EDM.tdsm.classifiers import (
    CLASSIFIERS,
    BasicBlock,
    CAS_class,
    ConditionalResNet,
    EDMPrecond_classifier,
    EDMPrecond_classifier_with_transition_matrix,
    class_logits,
)
from EDM.tdsm.noise import noise_of_classifier
from EDM.tdsm.transition import transition_matrix
from EDM.training.snapshots import read_snapshot, save_snapshot
from shared.cli import UserError
from shared.cpu.batchnorm import BatchNorm2d

KWARGS = dict(img_resolution=8, img_channels=3, label_dim=10, model_type="ClassifierSong", encoder_type="resnet18",
              augment_dim=9, dropout=0.13, embedding_type="positional", decoder_type="standard", model_channels=8)


class Persistent:
    """Pickles as the published wrapper of a class does: its name, its source and its state."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> tuple:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (
            dict(type="class", version=6, module_src="raise SystemExit", class_name=self.class_name, state=self.state),)


@pytest.fixture
def published_modules() -> Iterator[types.ModuleType]:
    """Make the names importable that a published pickle holds, for as long as one is written."""
    names = ("torch_utils", "torch_utils.persistence", "training", "training.resnet_cond")
    modules = {name: types.ModuleType(name) for name in names}

    def _reconstruct_persistent_obj(meta: dict) -> None:
        raise AssertionError("reading runs this")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    for name in ("BasicBlock", "ResNet_cond"):
        kind = type(name, (torch.nn.Module,), {"__module__": "training.resnet_cond"})
        setattr(modules["training.resnet_cond"], name, kind)
    sys.modules.update(modules)
    yield modules["training.resnet_cond"]
    for name in names:
        del sys.modules[name]


def plain(module: torch.nn.Module, classes: types.ModuleType) -> torch.nn.Module:
    """Return the module as an ordinary pickled one, under the published name of its class."""
    kinds = {ConditionalResNet: classes.ResNet_cond, BasicBlock: classes.BasicBlock, BatchNorm2d: torch.nn.BatchNorm2d}
    kind = kinds.get(type(module), type(module))
    copy = kind.__new__(kind)
    copy.__dict__ = {**module.__dict__, "_modules": {name: plain(child, classes)
                                                     for name, child in module._modules.items()}}
    return copy


def write(path: Path, net: torch.nn.Module, classes: types.ModuleType, loss: dict[str, Any]) -> None:
    def state_of(module: torch.nn.Module, children: dict[str, Any]) -> dict[str, Any]:
        return dict(training=False, _parameters=dict(module._parameters), _buffers=dict(module._buffers),
                    _non_persistent_buffers_set=set(), _modules=children, _init_args=(), _init_kwargs={})

    inner = {name: plain(child, classes) if name == "classifier" else
             None if child is None else Persistent(type(child).__name__, state_of(child, {}))
             for name, child in net.model._modules.items()}
    outer = state_of(net, dict(model=Persistent(type(net.model).__name__, state_of(net.model, inner))))
    outer["_init_kwargs"] = KWARGS
    with open(path, "wb") as file:
        pickle.dump(dict(ema=Persistent(type(net).__name__, outer), loss_fn=Persistent("EDMClassifierLoss", loss),
                         augment_pipe=None, dataset_kwargs=dict(path="x.zip")), file)


@pytest.mark.parametrize("kind", [EDMPrecond_classifier, EDMPrecond_classifier_with_transition_matrix])
def test_a_published_classifier_computes_the_same(kind: type, tmp_path: Path, published_modules) -> None:
    torch.manual_seed(0)
    net = kind(**KWARGS).eval()
    write(tmp_path / "network-snapshot-000000.pkl", net, published_modules,
          dict(P_mean=-1.2, noise_type="sym", noise_rate=0.4, num_classes=10, dataset="cifar10"))
    snapshot = read_snapshot(tmp_path / "network-snapshot-000000.pkl")
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 2.0])
    with torch.no_grad():
        assert torch.equal(class_logits(snapshot.build(CLASSIFIERS)(x, sigma)), class_logits(net(x, sigma)))
    noise = noise_of_classifier(snapshot, 10)
    if kind is EDMPrecond_classifier:
        assert np.allclose(noise.matrix, transition_matrix("sym", 0.4, 10))
    else:
        assert noise.noise_type == "learn"
        assert noise.matrix[0, 0] == pytest.approx(0.4824, abs=1e-4)


def test_a_resnet_of_another_origin_is_refused(tmp_path: Path, published_modules) -> None:
    kind = type("Other", (torch.nn.Module,), {"__module__": "training.resnet_cond"})
    published_modules.Other = kind
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(dict(ema=kind())))
    with pytest.raises(UserError, match="refused, it asks for training.resnet_cond.Other"):
        read_snapshot(tmp_path / "bad.pkl")


def test_ours_and_those_of_the_accuracy_score_come_back(tmp_path: Path) -> None:
    for net in (EDMPrecond_classifier(**KWARGS), CAS_class(8, 1, 4, "cnn")):
        save_snapshot(tmp_path / "net.pkl", net.eval(), dict(path="x"), dict(noise_type="clean"))
        snapshot = read_snapshot(tmp_path / "net.pkl")
        built = snapshot.build({**CLASSIFIERS, "CAS_class": CAS_class})
        assert snapshot.loss_kwargs == dict(noise_type="clean")
        assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), net.state_dict().values(),
                                                     strict=True))


def test_another_pretrained_network_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="expected the state_dict of torchvision's ResNet-50"):
        CAS_class(32, 3, 10, "resnet50_pretrained", weights=str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="absent.pth: no such checkpoint"):
        CAS_class(32, 3, 10, "resnet50_pretrained", weights=str(tmp_path / "absent.pth"))
