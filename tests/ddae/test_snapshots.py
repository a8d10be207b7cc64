"""Features of EDM snapshots: blocks by name, passes that end early, the network's own noise levels."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from DDAE.ddae.checkpoints import load_snapshot
from EDM.training.networks import PRECONDITIONERS
from EDM.training.snapshots import save_snapshot
from shared.cli import UserError

KINDS = [("EDMPrecond", "SongUNet", 0), ("EDMPrecond", "SongUNet", 10), ("VPPrecond", "SongUNet", 0),
         ("VEPrecond", "SongUNet", 0), ("EDMPrecond", "DhariwalUNet", 10)]


@pytest.mark.parametrize("precond, network, classes", KINDS)
def test_features_are_those_of_the_decoder_blocks(precond: str, network: str, classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = PRECONDITIONERS[precond](img_resolution=8, img_channels=3, label_dim=classes, model_type=network,
                                   model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[])
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_snapshot(tmp_path / "network-snapshot-000001.pkl", net.eval())
    probed, diffusion = load_snapshot(tmp_path / "network-snapshot-000001.pkl")
    assert probed.widths == {"out_1": 64, "out_2": 64, "out_3": 32, "out_4": 32}
    x01, noise, t = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([1, 4, 18])

    expected: dict[str, torch.Tensor] = {}
    ran: list[str] = []
    blocks = [(name, layer) for name, layer in probed.net.model.dec.items() if "_block" in name]

    def watch(name: str, layer: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, inputs: object, out: torch.Tensor) -> None:
            ran.append(name)
            expected[name] = out
        layer.register_forward_hook(hook)

    for name, layer in blocks:
        watch(name, layer)
    with torch.no_grad():
        sigma = diffusion.sigma(t).float()
        probed.net(2 * x01 - 1 + sigma[:, None, None, None] * noise, sigma)
        every = diffusion.features(probed, x01, t, noise)
    for (name, _), feature in zip(blocks, every.values(), strict=True):
        assert torch.allclose(feature, expected[name].mean((2, 3)))
    ran.clear()
    with torch.no_grad():
        some = diffusion.features(probed, x01, t, noise, ["out_2", "out_1"], norm=True)
    assert ran == [name for name, _ in blocks[:2]], "the pass goes on behind the last block"
    assert list(some) == ["out_2", "out_1"]
    torch.testing.assert_close(some["out_2"], torch.nn.functional.normalize(every["out_2"]))
    with pytest.raises(UserError, match="no block 'out_5'.* it has out_1, out_2, out_3, out_4"):
        probed.features(x01, sigma, ["out_5"])


def test_levels_stay_within_those_of_the_network(tmp_path: Path) -> None:
    net = PRECONDITIONERS["VEPrecond"](img_resolution=8, img_channels=1, model_channels=32, channel_mult=[1],
                                       num_blocks=1)
    save_snapshot(tmp_path / "ve.pkl", net)
    _, diffusion = load_snapshot(tmp_path / "ve.pkl")
    assert float(diffusion.sigma(1)) == pytest.approx(0.02) and float(diffusion.sigma(18)) == pytest.approx(80)
