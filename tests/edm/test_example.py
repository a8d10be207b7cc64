"""example.py: the published draws, its files, its mistakes."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from EDM.example import PRESETS, main
from EDM.sampling.samplers import denoiser, edm_sampler
from EDM.training.networks import EDMPrecond
from EDM.training.snapshots import load_network, save_snapshot
from shared.cli import UserError
from tests.edm.published_form import write_published
from tests.shared.programs import one_line_error, run

NETWORK = dict(img_resolution=8, img_channels=3, label_dim=3, model_type="SongUNet", model_channels=8,
               channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4])


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in the published form, under a published name."""
    torch.manual_seed(0)
    net = EDMPrecond(**NETWORK).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("networks") / "edm-imagenet-8x8-cond-adm.pkl"
    write_published(path, net, NETWORK)
    return path


def example(*flags: str) -> None:
    main(["--device=cpu", *flags])


@pytest.mark.parametrize("preset", PRESETS)
def test_draws_in_the_published_order(preset: str, snapshot: Path, tmp_path: Path) -> None:
    example(f"--network={snapshot}", f"--preset={preset}", f"--outdir={tmp_path}/grids", "--steps=3", "--seed=4")
    net = load_network(snapshot)
    torch.manual_seed(4)
    latents = torch.randn(64, 3, 8, 8)
    labels = torch.eye(3)[torch.randint(3, [64])]
    images = edm_sampler(denoiser(net, labels), latents, **PRESETS[preset] | {"num_steps": 3})
    expected = (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    grid = np.asarray(Image.open(tmp_path / "grids" / f"{preset}-8x8.png"))
    assert grid.shape == (64, 64, 3) and np.ptp(grid) > 100
    for number, image in enumerate(expected):
        row, column = divmod(number, 8)
        np.testing.assert_array_equal(grid[8 * row:8 * row + 8, 8 * column:8 * column + 8], image, f"{number}")


def test_preset_follows_the_name(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "CIFAR10-own.pkl").write_bytes(snapshot.read_bytes())
    example(f"--network={snapshot}", f"--network={tmp_path}/CIFAR10-own.pkl", f"--outdir={tmp_path}", "--steps=1")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["cifar10-8x8.png", "imagenet-8x8.png"]


def test_mistakes_are_one_line_and_leave_nothing(snapshot: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_snapshot(tmp_path / "latent-ffhq.pkl", EDMPrecond(**{**NETWORK, "img_channels": 4}))
    (tmp_path / "own.pkl").write_bytes(snapshot.read_bytes())
    (tmp_path / "cut-ffhq.pkl").write_bytes(snapshot.read_bytes()[:3000])
    for flags, message in (([], "network"),
                           ([f"--network={tmp_path}/own.pkl"], "--preset"),
                           ([f"--network={tmp_path}/none-ffhq.pkl"], "no such file"),
                           ([f"--network={snapshot}", f"--network={tmp_path}/none-ffhq.pkl"], "no such file"),
                           ([f"--network={tmp_path}/cut-ffhq.pkl"], "cut short"),
                           ([f"--network={tmp_path}/latent-ffhq.pkl"], "4 channels"),
                           ([f"--network={snapshot}", f"--network={tmp_path}/own.pkl", "--preset=ffhq"], "same file"),
                           ([f"--network={snapshot}", "--steps=0"], "--steps")):
        with pytest.raises(UserError) as error:
            example(*flags, f"--outdir={tmp_path}/out")
        text = str(error.value)
        assert message in text and "\n" not in text, text
        assert not list((tmp_path / "out").glob("*"))


def test_as_a_program(snapshot: Path, tmp_path: Path) -> None:
    run("EDM/example.py", f"--network={snapshot}", "--steps=1", "--device=cpu", cwd=tmp_path)
    assert (tmp_path / "imagenet-8x8.png").is_file()
    assert "no such file" in one_line_error(run("EDM/example.py", "--network=cifar10.pkl", status=2, cwd=tmp_path))
