"""What programs say of their own accord: tensors that a transfer took, guidance without label dropout, a warm-up longer
than the run, a run resumed past its end, classes without test images, bf16 on a processor that has none."""
from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from DDAE.ddae.config import choose_precision as ddae_precision
from EDM import fid, generate, train
from EDM.training.networks import EDMPrecond
from EDM.training.snapshots import save_snapshot
from shared.training import precision
from tests.edm import training_runs as edm
from tests.edm.scored_images import write_classifier, write_images
from tests.torchssl import tiny as torchssl
from TorchSSL import freematch
from TorchSSL.core.trainer import choose_precision

SHORT = ("--duration=0.0001", "--nosubdir", "--device=cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    edm.write_set(tmp_path / "three.zip")
    return tmp_path


def network(classes: int, **more: float) -> EDMPrecond:
    return EDMPrecond(8, 3, classes, model_type="SongUNet", model_channels=8, channel_mult=[1, 1], num_blocks=1,
                      attn_resolutions=[4], augment_dim=9, **more)


@pytest.mark.parametrize("classes", [3, 7])
def test_transfer(place: Path, classes: int, capsys: pytest.CaptureFixture) -> None:
    """A snapshot of other classes gives all but the layer of the labels, which starts anew."""
    save_snapshot(place / "net.pkl", network(classes))
    train.main([*edm.TINY, *SHORT, "--data=three.zip", "--outdir=run", "--transfer=net.pkl"])
    said, own = capsys.readouterr().out, len(network(3).state_dict())
    assert f"{own - (classes != 3)} of the {own} tensors of the network are those of net.pkl" in said
    assert ("the layer of the labels starts anew" in said) == (classes != 3)


def test_a_run_that_is_resumed_past_its_end(place: Path, capsys: pytest.CaptureFixture) -> None:
    train.main([*edm.TINY, *SHORT, "--data=three.zip", "--outdir=run", "--duration=0.001"])
    state = sorted((place / "run").glob("training-state-*.pt"))[-1]
    train.main([*edm.TINY, *SHORT, "--data=three.zip", "--outdir=more", "--duration=0.001", f"--resume={state}"])
    assert "--duration ends at 1: one more step is trained; give a longer --duration" in capsys.readouterr().out


def test_a_warm_up_that_outlasts_the_run(place: Path) -> None:
    flags = [flag for flag in edm.TINY if "rampup" not in flag and "duration" not in flag]
    with pytest.warns(UserWarning, match="--lr is never reached; give a shorter --lr-rampup"):
        train.main([*flags, *SHORT, "--data=three.zip", "--outdir=run"])


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_guidance(place: Path, dropout: float) -> None:
    save_snapshot(place / "net.pkl", network(3, label_dropout=dropout))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate.main(["--network=net.pkl", "--outdir=made", "--seeds=0-1", "--steps=2", "--guidance=2", "--class=1",
                       "--device=cpu"])
    assert any("trained without label dropout" in str(one.message) for one in caught) == (dropout == 0)


def test_a_class_without_test_images_has_no_accuracy(place: Path) -> None:
    for split, classes in (("train", "abc"), ("test", "ac")):
        for name in classes:
            edm_images(place / "own" / split / name)
    torchssl.call("--dataset=own", "--num_labels=6", "--device=cpu")
    found = json.loads((place / "saved_models" / "tiny" / "result.json").read_text())["accuracy_by_class"]
    assert found[1] is None and all(0 <= found[label] <= 1 for label in (0, 2))


def edm_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (8, 8), (50 * number, len(folder.name) * 9, ord(folder.name) % 200)).save(
            folder / f"{number}.png")


@pytest.mark.parametrize("size", [8, 12])
def test_images_and_reference_of_unequal_size(place: Path, size: int) -> None:
    write_classifier(place / "judge.pth")
    write_images(place / "real", 20, seed=0)
    write_images(place / "made", 20, seed=1, size=size)
    detector = ("--detector=judge.pth", "--device=cpu")
    fid.main(["ref", "--data=real", "--dest=real.npz", *detector])
    for reference in ("real.npz", "real"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fid.main(["calc", "--images=made", f"--ref={reference}", "--num=20", *detector])
        assert any("images of 12x12 are compared with 8x8" in str(one.message) for one in caught) == (size == 12)


def test_bf16_on_a_processor_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    cpu = torch.device("cpu")
    assert not precision.computes_bf16(cpu)
    with pytest.warns(UserWarning, match="--amp True: this processor has no bf16"):
        assert choose_precision(freematch.parse(["--amp=True"]), cpu) == "fp32"
    assert choose_precision(freematch.parse(["--precision=bf16"]), cpu) == "bf16"
    options = type("Options", (), {"use_amp": True, "precision": None, "strict": False})()
    with pytest.warns(UserWarning, match="--use_amp: this processor has no bf16"):
        assert ddae_precision(options, cpu) == "fp32"
