"""Exported networks: every kind gives its own numbers in every form, with class names and normalisation beside it."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open

from DASO.lib.models.semi import SemiModel
from DASO.lib.models.wrn import WRN
from EDM.tdsm.classifiers import EDMPrecond_classifier
from EDM.training.networks import EDMPrecond
from EDM.training.snapshots import load_network, save_snapshot
from MetaSemi.core.model import ConvLarge, ShakeShakeBlock, SmallNet
from shared.cli import UserError
from tests.shared.programs import one_line_error, run
from TorchSSL import export, freematch
from TorchSSL.core.classifier import open_classifier
from TorchSSL.core.networks import build_network

NAMES = ("zero", "one", "two", "three")
FACTS = {"classes": NAMES, "mean": (0.3,), "std": (0.4,), "size": (8, 8)}


def learner(name: str, path: Path, **options: object) -> Path:
    """Write a checkpoint as a learner of TorchSSL does."""
    net = build_network(name, 4, in_channels=1, size=(8, 8), **options)
    flags = vars(freematch.parse([f"--net={name}", "--depth=10", "--widen_factor=1", "--dataset=digits"]))
    torch.save({"ema_model": scrambled(net).state_dict(), **FACTS,
                "options": {**flags, "given": ["net"], "num_classes": 4}}, path)
    return path


def scrambled(net: torch.nn.Module) -> torch.nn.Module:
    """Give every tensor numbers of its own, so that a forgotten one shows."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.rand(value.shape, generator=random)
    return net.eval()


def daso(path: Path) -> Path:
    net = SemiModel(WRN(1, 1, 10), 4, balanced=True, rotation=True)
    torch.save({"ema_model": {f"ema_model.{name}": value for name, value in scrambled(net).state_dict().items()},
                "model": net.state_dict(), "config": {"DATASET.NAME": "digits"}, **FACTS}, path)
    return path


def metasemi(net: torch.nn.Module, path: Path, **facts: object) -> Path:
    torch.save({"model": scrambled(net).state_dict(), "config": {"dataset": "digits"}, **FACTS, **facts}, path)
    return path


def tdsm(path: Path) -> Path:
    torch.manual_seed(0)
    net = EDMPrecond_classifier(img_resolution=8, img_channels=1, label_dim=4, model_type="ClassifierSong",
                                model_channels=16, encoder_type="resnet18")
    save_snapshot(path, scrambled(net), {"class_names": list(NAMES), "label_counts": [1, 1, 1, 1]})
    return path


def denoiser(path: Path, classes: int) -> Path:
    torch.manual_seed(0)
    net = EDMPrecond(img_resolution=8, img_channels=1, label_dim=classes, model_type="SongUNet", model_channels=16,
                     channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    save_snapshot(path, scrambled(net), {"classes": list(NAMES[:classes])})
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "wide": lambda folder: learner("WideResNet", folder / "a.pth", depth=10, widen_factor=1),
    "wide, rotation": lambda folder: learner("WideResNet", folder / "a.pth", depth=10, widen_factor=1,
                                             rotation_head=True),
    "wide, four stages": lambda folder: learner("WideResNetVar", folder / "a.pth", depth=10, widen_factor=1),
    "timm": lambda folder: learner("timm:test_resnet", folder / "a.pth"),
    "timm, rotation": lambda folder: learner("timm:test_efficientnet", folder / "a.pth", rotation_head=True),
    "DASO": lambda folder: daso(folder / "a.pth.tar"),
    "MetaSemi small": lambda folder: metasemi(SmallNet(1, 4, 4), folder / "a.pth"),
    "MetaSemi convlarge": lambda folder: metasemi(ConvLarge(1, 4), folder / "a.pth", size=(16, 16)),
    "TDSM": lambda folder: tdsm(folder / "a.pkl"),
}


QUICK = {("wide, rotation", "onnx"), ("TDSM", "torch-export"), *((kind, "safetensors") for kind in KINDS)}
EVERY = [pytest.param(kind, form, marks=() if (kind, form) in QUICK else pytest.mark.slow, id=f"{kind} {form}")
         for kind in KINDS for form in export.ENDINGS]


@pytest.mark.parametrize("kind, form", EVERY)
def test_every_kind_of_classifier_gives_its_logits_in_every_form(kind: str, form: str, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture) -> None:
    source, out = KINDS[kind](tmp_path), tmp_path / f"out{export.ENDINGS[form]}"
    torch.manual_seed(0)
    command = [f"--load_path={source}", f"--to={form}", f"--out={out}"]
    export.main(command)  # checks the logits
    classifier = open_classifier(source)
    images = torch.randn(5, classifier.channels, *classifier.size)
    with torch.no_grad():
        expected = classifier.net(images)
    if form == "onnx":
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        about = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
        assert json.loads(about["classes"]) == list(NAMES) and len(json.loads(about["mean"])) == 1
    elif form == "safetensors":
        export.main([f"--load_path={out}", "--to=safetensors", f"--out={tmp_path / 'again.safetensors'}"])
        again = open_classifier(tmp_path / "again.safetensors")
        found = again.net(images)
        assert (again.classes, again.mean, again.std, again.size) == (NAMES, classifier.mean, classifier.std,
                                                                      classifier.size)
    else:
        files = {"fewlabel.json": ""}
        found = torch.export.load(out, extra_files=files).module()(images)
        assert json.loads(files["fewlabel.json"])["classes"] == list(NAMES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    export.main(command)
    assert f"complete: {out}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_shake_shake_block_is_traced_as_in_evaluation(tmp_path: Path) -> None:
    block = scrambled(ShakeShakeBlock(4, 4))
    images = torch.randn(3, 4, 8, 8)
    about = {"classes": NAMES, "kind": "block", "channels": 4, "size": (8, 8)}
    network = export.Exported(net=block, inputs={"images": images}, output="logits", about=about)
    assert export.write_onnx(network, tmp_path / "a.onnx") < 1e-5


@pytest.mark.parametrize("classes", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_a_denoiser_is_one_call_of_d(classes: int, tmp_path: Path) -> None:
    source = denoiser(tmp_path / "a.pkl", classes)
    for form in export.ENDINGS:
        export.main([f"--load_path={source}", f"--to={form}", f"--out={tmp_path / 'd'}{export.ENDINGS[form]}"])
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx", providers=["CPUExecutionProvider"])
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0, 70.0]), torch.eye(4)
    inputs = {"x": x.numpy(), "sigma": sigma.numpy(), **({"class_labels": labels.numpy()} if classes else {})}
    net = load_network(source)
    expected = net(x, sigma, labels if classes else None)
    np.testing.assert_allclose(session.run(None, inputs)[0], expected.numpy(), rtol=1e-4, atol=1e-4)
    again = load_network(tmp_path / "d.safetensors")
    torch.testing.assert_close(again(x, sigma, labels if classes else None), expected)


def test_safetensors_of_timm_load_in_timm(tmp_path: Path) -> None:
    source = learner("timm:test_resnet", tmp_path / "a.pth")
    export.main([f"--load_path={source}", "--to=safetensors", f"--out={tmp_path / 'a.safetensors'}"])
    net = timm.create_model("test_resnet", num_classes=4, in_chans=1, checkpoint_path=tmp_path / "a.safetensors").eval()
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(net(images), open_classifier(source).net(images))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(NAMES)


def test_a_model_card_says_data_labels_accuracy_command_commit_and_licence(tmp_path: Path) -> None:
    source = KINDS["wide"](tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({
        "dataset": "digits", "num_labels": 40, "unlabeled_images": 1297, "seed": 3, "accuracy": {"last": 0.875},
        "accuracy_by_class": [0.5, 0.75, 1.0, 0.25]}))
    export.main([f"--load_path={source}", "--to=safetensors", f"--out={tmp_path / 'a.safetensors'}", "--model-card"])
    card = (tmp_path / "a.safetensors.md").read_text()
    for words in ("digits", "40 labelled of 1297 images", "last: 0.8750", "| three | 0.2500 |", "MIT", "commit",
                  "python freematch.py --net WideResNet", "--to safetensors"):
        assert words in card


@pytest.mark.parametrize("flags, words", [
    (["--to=onnx", "--out=a.pt2"], "ends in .onnx"),
    (["--to=onnx", "--out=a.onnx", "--load_path=no.pth"], "there is no file no.pth"),
    (["--to=onnx", "--out=a.onnx", "--load_path=text.pth"], "text.pth"),
    (["--to=safetensors", "--out=a.safetensors", "--load_path=text.safetensors"], "text.safetensors"),
])
def test_what_cannot_be_exported_is_one_line(flags: list[str], words: str, tmp_path: Path) -> None:
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("hello")
    assert words in one_line_error(run("TorchSSL/export.py", *flags, cwd=tmp_path, status=2))
    assert not list(tmp_path.glob("a.*"))


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'install "fewlabel\[export\]"'):
        export.main([f"--load_path={KINDS['wide'](tmp_path)}", "--to=onnx", f"--out={tmp_path / 'a.onnx'}"])


def test_a_file_with_other_logits_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="nothing was kept"):
        export.main([f"--load_path={KINDS['wide'](tmp_path)}", "--to=torch-export", f"--out={tmp_path / 'a.pt2'}"])
    assert not list(tmp_path.glob("*.pt2"))
