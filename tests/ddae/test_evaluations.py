"""Contrastive metrics, noise-conditional classifiers, fine-tuning: results, continuation, processes, mistakes."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from DDAE import contrastive, finetune, noisy_classifier_DDAE, noisy_classifier_WRN
from DDAE.contrastive import alignment, uniformity
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.ddae.tiny import DDPM, TEST, TRAIN, call, call_in, killed, make_folder, result
from tests.shared.programs import assert_same, run

WRN = ("--device=cpu", "--dataset=digits.npz.d", "--epoch=2", "--warm_epoch=1", "--batch_size=20", "--no_flip",
       "--pad=1", "--blocks_per_group=1", "--channel_multiplier=1")
HEAD = ("--epoch=2",)
TUNE = ("--epoch=2", "--epochs=2", "--batch_size=20", "--eval_every=1", "--warm_epoch=1", "--randaugment",
        "--mixup=0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("evaluations"))


def call_wrn(folder: Path, *flags: str) -> None:
    call(noisy_classifier_WRN, *WRN, *flags, folder=folder)


# ------------------------------------------------------------------------------------------------------- contrastive

def test_metrics_by_their_definition() -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64), dim=1) for _ in range(2))
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    spread = np.log(np.mean([np.exp(-2 * float((x[i] - x[j]).square().sum())) for i, j in pairs]))
    assert float(uniformity(x)) == pytest.approx(spread, abs=1e-12)
    assert float(alignment(x, y)) == pytest.approx(float((x - y).square().sum(1).mean()), abs=1e-12)
    assert float(alignment(x, x)) == 0 and float(uniformity(x[:1].repeat(3, 1))) == pytest.approx(0, abs=1e-12)


def test_contrastive_over_checkpoints(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.warns(UserWarning, match="no checkpoints of the epochs 3; they are left out"):
        call_in(folder, contrastive, "--epoch_interval=1", "--set=n_epoch=4")
    out = capsys.readouterr().out
    found = result(folder / "out" / "contrastive")["epochs"]
    assert list(found) == ["1", "2"]
    values = [found[epoch]["align"]["out_2"] for epoch in found]
    assert "align metric:\n'out_1': [" in out and f"'out_2': [{values[0]:.4f}, {values[1]:.4f}]" in out
    assert all(0 <= value <= 4 for epoch in found.values() for value in epoch["align"].values())
    assert all(-8 <= value <= 0 for epoch in found.values() for value in epoch["uniform"].values())
    assert min(Image.open(folder / "out" / "contrastive" / "curves.png").size) > 100


def test_contrastive_with_two_processes_and_what_is_there(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--epochs=2", "--gpus=1")
    call_in(folder, contrastive, *flags, f"--outdir={one}")
    run("DDAE/contrastive.py", "--config=tiny.yaml", "--device=cpu", *flags, f"--outdir={two}", cwd=folder, ranks=2)
    first, second = (result(path)["epochs"]["2"] for path in (one, two))
    for metric in ("align", "uniform"):
        assert second[metric] == pytest.approx(first[metric], abs=1e-6)
    # What result.json has for the same weights and settings is not measured again.
    content = json.loads((one / "result.json").read_text())
    content["epochs"]["2"]["align"]["out_1"] = 3.25
    (one / "result.json").write_text(json.dumps(content))
    call_in(folder, contrastive, *flags, f"--outdir={one}")
    assert result(one)["epochs"]["2"]["align"]["out_1"] == 3.25
    call_in(folder, contrastive, *flags, "--seed=1", f"--outdir={one}")
    assert result(one)["epochs"]["2"]["align"]["out_1"] != 3.25


def test_contrastive_depends_on_the_batch_as_published(folder: Path, tmp_path: Path) -> None:
    found = {}
    for images in (20, 40):
        call_in(folder, contrastive, "--epochs=2", f"--images={images}", f"--outdir={tmp_path / str(images)}")
        found[images] = result(tmp_path / str(images))["epochs"]["2"]
    assert found[20]["about"]["batch"] == 20 and found[40]["about"]["images"] == 40


# -------------------------------------------------------------------------------------------------------- classifiers

@pytest.mark.parametrize(("mode", "levels"), [("DDPM", list(range(1, 1000, 50))), ("EDM", list(range(1, 19)))])
def test_wrn(folder: Path, tmp_path: Path, mode: str, levels: list[int], capsys: pytest.CaptureFixture) -> None:
    call_wrn(folder, f"--mode={mode}", f"--save_dir={tmp_path}")
    content = result(tmp_path)
    assert list(map(int, content["by_level"])) == levels
    counts = np.array(list(content["by_level"].values())) * TEST
    assert np.allclose(counts, counts.round())
    out = capsys.readouterr().out
    assert "[epoch 1 / iter 0]: lr 0.0500 loss: " in out and f"[timestep {levels[-1]}]: Test acc: 0." in out
    assert (tmp_path / "curve.png").exists()


def test_wrn_killed_and_continued_is_bitwise_the_same(folder: Path, tmp_path: Path) -> None:
    killed(folder, "DDAE.noisy_classifier_WRN", *WRN, f"--save_dir={tmp_path / 'killed'}", at=3)
    for name in ("killed", "whole"):
        call_wrn(folder, f"--save_dir={tmp_path / name}")
    nets = [read_checkpoint(tmp_path / name / "checkpoint.pt")["net"] for name in ("killed", "whole")]
    assert_same(*nets)
    assert result(tmp_path / "killed")["by_level"] == result(tmp_path / "whole")["by_level"]


def test_wrn_with_two_processes(folder: Path, tmp_path: Path) -> None:
    call_wrn(folder, f"--save_dir={tmp_path / 'one'}")
    run("DDAE/noisy_classifier_WRN.py", *WRN, "--gpus=1", f"--save_dir={tmp_path / 'two'}", cwd=folder, ranks=2)
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt")["net"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)


def test_ddae_head_and_comparison(folder: Path, tmp_path: Path) -> None:
    call_in(folder, noisy_classifier_DDAE, *HEAD, f"--outdir={tmp_path / 'head'}")
    content = result(tmp_path / "head")
    assert list(map(int, content["by_level"])) == list(range(1, 19))
    assert content["accuracy"]["last"] == pytest.approx(np.mean(list(content["by_level"].values())))
    call_in(folder, noisy_classifier_DDAE, *HEAD, "--block=out_4", f"--outdir={tmp_path / 'other'}",
            f"--compare={tmp_path / 'head' / 'result.json'}")
    assert result(tmp_path / "other")["name"].endswith("out_4")
    with pytest.raises(UserError, match="not the result.json of a noise-conditional classifier"):
        call_in(folder, noisy_classifier_DDAE, *HEAD, "--compare=tiny.yaml")


def test_ddae_head_of_ddpm(tmp_path: Path) -> None:
    make_folder(tmp_path / "ddpm", epochs=(2,), **DDPM)
    call_in(tmp_path / "ddpm", noisy_classifier_DDAE, *HEAD)
    content = result(tmp_path / "ddpm" / "out" / "noisy_classifier" / "ep2_out_2")
    assert list(map(int, content["by_level"])) == list(range(1, 51, 2))


def test_ddae_head_killed_and_continued_is_bitwise_the_same(folder: Path, tmp_path: Path) -> None:
    flags = ("--config=tiny.yaml", "--device=cpu", *HEAD, f"--outdir={tmp_path / 'killed'}")
    killed(folder, "DDAE.noisy_classifier_DDAE", *flags, at=3)
    for name in ("killed", "whole"):
        call_in(folder, noisy_classifier_DDAE, *HEAD, f"--outdir={tmp_path / name}")
    assert_same(*(read_checkpoint(tmp_path / name / "checkpoint.pt")["head"] for name in ("killed", "whole")))


def test_ddae_head_with_two_processes(folder: Path, tmp_path: Path) -> None:
    call_in(folder, noisy_classifier_DDAE, *HEAD, f"--outdir={tmp_path / 'one'}")
    run("DDAE/noisy_classifier_DDAE.py", "--config=tiny.yaml", "--device=cpu", *HEAD, "--gpus=1",
        f"--outdir={tmp_path / 'two'}", cwd=folder, ranks=2)
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt")["head"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------- fine-tuning

@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned")
    call_in(folder, finetune, *TUNE, f"--outdir={out}")
    return out


def test_finetune_trains_what_lies_before_the_block(folder: Path, tuned: Path) -> None:
    content = result(tuned)
    assert content["accuracy"]["last"] == content["tests"][-1][1] / 100 and len(content["tests"]) == 2
    state = read_checkpoint(tuned / "checkpoint.pt")["net"]
    start = read_checkpoint(folder / "out" / "ckpts" / "model_2.pth")["EMA"]
    changed = {name.removeprefix("body.") for name, value in state.items() if name.startswith("body.")
               and not torch.equal(value, start[f"ema_model.nn_model.{name.removeprefix('body.')}"])}
    # up.0 and up.1 make out_1 and out_2; nothing behind them is touched.
    assert any(name.startswith("up.1.") for name in changed) and any(name.startswith("down.0.") for name in changed)
    assert not [name for name in changed if name.startswith(("up.2.", "up.3.", "norm.", "final."))]


def test_finetune_killed_and_continued_is_bitwise_the_same(folder: Path, tuned: Path, tmp_path: Path) -> None:
    killed(folder, "DDAE.finetune", "--config=tiny.yaml", "--device=cpu", *TUNE, f"--outdir={tmp_path}", at=4)
    call_in(folder, finetune, *TUNE, f"--outdir={tmp_path}")
    assert_same(*(read_checkpoint(path / "checkpoint.pt")["net"] for path in (tmp_path, tuned)))
    assert result(tmp_path)["tests"] == result(tuned)["tests"]


def test_finetune_with_two_processes(folder: Path, tuned: Path, tmp_path: Path) -> None:
    run("DDAE/finetune.py", "--config=tiny.yaml", "--device=cpu", *TUNE, "--gpus=1", f"--outdir={tmp_path}",
        cwd=folder, ranks=2)
    one, two = (read_checkpoint(path / "checkpoint.pt")["net"] for path in (tuned, tmp_path))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=1e-3)


def test_finetune_without_noise_and_from_scratch(folder: Path, tmp_path: Path) -> None:
    call_in(folder, finetune, "--epochs=1", "--encoder=untrained", "--no_noise", "--time=1", "--block=out_1",
            f"--outdir={tmp_path}")
    content = result(tmp_path)
    assert content["config"]["no_noise"] and (content["config"]["level"], content["config"]["block"]) == (1, "out_1")
    assert content["iterations"] == 1 and TRAIN < 128


@pytest.mark.parametrize(("module", "flags", "message"), [
    (finetune, ("--epoch=2", "--block=up_3"), "no block 'up_3'.*it has out_1"),
    (finetune, ("--epoch=2", "--time=0"), "noise level 0: EDM features are taken at 1 to 18"),
    (finetune, ("--epoch=2", "--mixup=-1"), "'--mixup': -1.0 is not in the range x>=0"),
    (noisy_classifier_DDAE, ("--epoch=5",), "there are the epochs 1, 2"),
    (contrastive, ("--epochs=1,9",), "model_9.pth; there are the epochs 1, 2"),
    (contrastive, ("--epoch_interval=7", "--set=n_epoch=9"), "there are the epochs 1, 2"),
])
def test_mistakes(folder: Path, module, flags: tuple[str, ...], message: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        call_in(folder, module, *flags)
    assert sorted(folder.rglob("*")) == before
