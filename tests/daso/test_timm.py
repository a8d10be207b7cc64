"""A network of timm as the encoder of DASO's learners."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.cli import UserError
from shared.networks import TimmNetwork
from tests.daso.small import call
from TorchSSL.core.classifier import open_classifier


def test_it_trains_from_given_weights_and_its_checkpoint_is_opened(tmp_path: Path) -> None:
    net = TimmNetwork("test_resnet", 3, 1, (8, 8))
    torch.save(net.body.state_dict(), tmp_path / "start.pth")
    keys = {"MODEL.NAME": "timm:test_resnet", "MODEL.PRETRAINED": str(tmp_path / "start.pth"), "SOLVER.BASE_LR": 0.0,
            "DATASET.RESOLUTION": 8}
    folder = call("fixmatch_daso", tmp_path / "runs", keys)
    encoder = open_classifier(folder / "model_final.pth.tar").network.encoder
    assert isinstance(encoder, TimmNetwork)
    torch.testing.assert_close(encoder.body.conv1[0].weight, net.body.conv1[0].weight)
    (tmp_path / "start.pth").write_text("no weights")
    with pytest.raises(UserError, match="start.pth"):
        call("fixmatch_daso", tmp_path / "more", keys)


def test_an_unknown_network_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='did you mean "test_resnet"'):
        call("fixmatch_daso", tmp_path, {"MODEL.NAME": "timm:test_resnot"})
