"""MSN pre-training: what it writes, what stops it, and that interruptions and ranks change nothing."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cli import UserError
from shared.training.run import Run
from tests.shared.programs import assert_same, run
from TorchSSL import train_msn
from TorchSSL.encoders.encoder import open_encoder
from TorchSSL.encoders.views import draw_views, hue_turns, make_views

TINY = ("--dataset=digits --model=deit_tiny --img_size=16 --patch_size=8 --embed_dim=16 --depth=2 --num_heads=2 "
        "--hidden=32 --output_dim=8 --prototypes=20 --focal_views=2 --focal_size=8 --batch_size=600 --epochs=3 "
        "--warmup=1 --log_every=2 --device=cpu").split()


def trained(folder: Path) -> dict:
    return torch.load(folder / "encoder.pth.tar", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_msn.main([*TINY, f"--outdir={folder}"])
    return folder


def test_the_encoder_serves_elsewhere(whole, capsys):
    encoder = open_encoder(whole / "encoder.pth.tar")
    assert encoder.view.size == 16 and encoder.width == 16
    assert torch.isfinite(encoder(torch.rand(2, 3, 16, 16))).all()
    train_msn.main([*TINY, f"--outdir={whole}"])
    assert "complete" in capsys.readouterr().out


def test_killed_and_resumed_it_is_bitwise_the_same(whole, tmp_path, monkeypatch):
    after = Run._after_step

    def killed(self, total):
        if self.step == 4:
            raise KeyboardInterrupt
        after(self, total)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_after_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_msn.main([*TINY, f"--outdir={tmp_path}", "--save_seconds=0.001"])
    train_msn.main([*TINY, f"--outdir={tmp_path}"])
    assert "continuing at step 3" in (tmp_path / "log.txt").read_text()
    assert_same(trained(tmp_path), trained(whole))


def test_two_ranks_are_one(whole, tmp_path):
    run("TorchSSL/train_msn.py", *TINY, f"--outdir={tmp_path}", ranks=2)
    ours, theirs = trained(tmp_path), trained(whole)
    for name, value in theirs["target_encoder"].items():
        torch.testing.assert_close(ours["target_encoder"][name], value, rtol=1e-3, atol=1e-4, msg=name)
    one, two = ([json.loads(line)["loss"] for line in (folder / "stats.jsonl").read_text().splitlines()]
                for folder in (whole, tmp_path))
    assert two[0] == pytest.approx(one[0], rel=2e-5)
    assert two == pytest.approx(one, rel=1e-3)  # Adam enlarges what is rounded in gradients near zero


def test_photographs_of_any_size(tmp_path):
    for number in range(4):
        path = tmp_path / "photos/train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((130 + number, 150, 3), 60 * number, np.uint8)).save(path)
    train_msn.main([*TINY, f"--dataset={tmp_path}/photos", f"--outdir={tmp_path}/run", "--batch_size=2"])
    assert trained(tmp_path / "run")["epoch"] == 3


@pytest.mark.parametrize("flags, message", [
    (["--img_size=20"], "--img_size: 20 is no multiple of the patches' side, 8"),
    (["--num_heads=3"], "--embed_dim: 16 cannot be shared by 3 heads"),
    (["--batch_size=5000"], "--batch_size: digits has only 1297 images"),
    (["--model=deit_tny"], "'--model'"),
])
def test_what_cannot_be_trained(flags, message, tmp_path):
    with pytest.raises(UserError) as error:
        train_msn.main([*TINY, f"--outdir={tmp_path}/run", *flags])
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_views_show_the_image_they_are_made_of():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 24, 24)).astype(np.uint8))
    draws = draw_views(40, np.random.default_rng(1), (0.3, 1.0))
    assert make_views(images, draws, 12).shape == (40, 3, 12, 12)
    whole = draw_views(40, np.random.default_rng(1), (1.0, 1.0), flip=False)
    plain = np.zeros(40)
    for name, value in (("aspect", plain + 1), ("grey", plain > 1), ("blur", plain),
                        ("colour", np.tile([1.0, 1, 1, 0], (40, 1)))):
        object.__setattr__(whole, name, value)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (train_msn.MEAN, train_msn.STD))
    torch.testing.assert_close(make_views(images, whole, 24), (images / 255 - mean) / std, atol=1e-4, rtol=0)
    # Grey stays grey, and a third of a turn takes red to another primary colour.
    np.testing.assert_allclose(hue_turns(np.array([1.0]))[0] @ np.ones(3), 1, atol=1e-6)
    np.testing.assert_allclose(hue_turns(np.array([2 * np.pi / 3]))[0][:, 0], [0, 1, 0], atol=1e-6)
