"""predict.py and the opening of any classifier: the numbers of eval.py, whatever the batch, the ranks and the form."""
from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from DASO.lib.models.semi import SemiModel
from DASO.lib.models.wrn import WRN
from EDM.dataset_tool import convert
from EDM.tdsm.classifiers import EDMPrecond_classifier
from EDM.training.snapshots import save_snapshot
from MetaSemi.core.model import ConvLarge, SmallNet, shakeshake26
from MetaSemi.imagenet.views import CentreCrop
from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.images import ImageSet, read_images
from shared.data.photographs import PhotographSet
from shared.data.pool import PhotographPool
from shared.data.writers import write_folder, write_npz
from tests.shared.programs import run
from tests.torchssl.tiny import call
from TorchSSL import eval as evaluation_script
from TorchSSL import predict as prediction_script
from TorchSSL.core import classifier
from TorchSSL.core.classifier import open_classifier
from TorchSSL.core.evaluation import predict_split

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the digits that hardly learned anything."""
    folder = tmp_path_factory.mktemp("trained")
    call(f"--save_dir={folder}")
    return folder / "tiny" / "latest_model.pth"


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_dataset("digits", "test").subset(np.arange(150))


@pytest.fixture(scope="module")
def npz(digits: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("npz") / "digits.npz"
    write_npz(digits, path)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(checkpoint: Path, images: Path, out: Path, *more: str) -> None:
    prediction_script.main([f"--load_path={checkpoint}", f"--images={images}", f"--out={out}", *more])


def test_equal_to_eval_whatever_the_batch_and_the_ranks(checkpoint: Path, digits: ImageSet, npz: Path,
                                                        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = evaluation_script.parse([f"--load_path={checkpoint}", "--batch_size=37"])
    logits = predict_split(options, "test")[0][:len(digits)]
    assert torch.equal(logits, open_classifier(checkpoint).logits(digits.images))

    predict(checkpoint, npz, tmp_path / "one.csv", "--top=2")
    found = rows(tmp_path / "one.csv")
    assert list(found[0]) == ["file", "class", "probability", "class_2", "probability_2"]
    assert [row["file"] for row in found] == list(map(str, range(150)))
    assert [int(row["class"]) for row in found] == logits.argmax(1).tolist()
    best = logits.double().softmax(1).topk(2).values.tolist()
    assert [[row["probability"], row["probability_2"]] for row in found] == [[f"{p:.6f}" for p in two] for two in best]

    predict(checkpoint, npz, tmp_path / "small.csv", "--top=2", "--batch_size=1")
    run("TorchSSL/predict.py", f"--load_path={checkpoint}", f"--images={npz}", f"--out={tmp_path / 'ranks.csv'}",
        "--top=2", ranks=2)
    assert len({(tmp_path / name).read_bytes() for name in ("one.csv", "small.csv", "ranks.csv")}) == 1
    capsys.readouterr()
    predict(checkpoint, npz, tmp_path / "one.csv", "--top=2")
    assert "complete: " in capsys.readouterr().out
    with pytest.raises(UserError, match="give --overwrite"):
        predict(checkpoint, npz, tmp_path / "one.csv")
    assert not list(tmp_path.glob(".*part*"))


def test_pseudo_labels_by_name(checkpoint: Path, digits: ImageSet, tmp_path: Path) -> None:
    """get_labels.py names the files of own images and the classes, with the probabilities of predict.py."""
    named = ImageSet(digits.images, digits.labels, tuple(f"digit {number}" for number in range(10)), "digits")
    write_folder(named, tmp_path / "own" / "train")
    run("TorchSSL/get_labels.py", f"--load_path={checkpoint}", f"--dataset={tmp_path}/own", f"--save_path={tmp_path}")
    found = rows(tmp_path / "pseudo_label.csv")
    numbers = np.load(tmp_path / "pseudo_label.npy")
    predict(checkpoint, tmp_path / "own" / "train", tmp_path / "predictions.csv", "--top=1")
    expected = {row["file"]: row for row in rows(tmp_path / "predictions.csv")}
    assert len(found) == len(expected) == 150
    for row, number in zip(found, numbers, strict=True):
        assert expected[row["file"]]["class"] == row["label"] == str(number)
        assert float(row["probability"]) == pytest.approx(float(expected[row["file"]]["probability"]), abs=2e-6)


def test_files_of_a_folder_and_a_zip(checkpoint: Path, digits: ImageSet, npz: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture) -> None:
    write_folder(digits, tmp_path / "folder")
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "folder")
    predict(checkpoint, npz, tmp_path / "array.csv")
    by_position = rows(tmp_path / "array.csv")
    predict(checkpoint, tmp_path / "folder", tmp_path / "folder.csv", "--sort-into", str(tmp_path / "sorted"), "--html",
            str(tmp_path / "page.html"))
    found = rows(tmp_path / "folder.csv")
    assert [row["file"] for row in found] == sorted(row["file"] for row in found) and len(found) == 150
    assert sorted(row["probability"] for row in found) == sorted(row["probability"] for row in by_position)
    predict(checkpoint, tmp_path / "zipped.zip", tmp_path / "zip.csv", "--sort-into", str(tmp_path / "unpacked"))
    assert rows(tmp_path / "zip.csv") == found

    for row in found:
        link, copy = (tmp_path / name / row["class"] / row["file"] for name in ("sorted", "unpacked"))
        assert os.path.samefile(link, tmp_path / "folder" / row["file"]) and link.is_symlink()
        assert not copy.is_symlink() and copy.read_bytes() == link.read_bytes()
    capsys.readouterr()
    predict(checkpoint, tmp_path / "folder", tmp_path / "folder.csv", "--sort-into", str(tmp_path / "sorted"),
            "--html", str(tmp_path / "page.html"))
    assert capsys.readouterr().out.count("complete: ") == 3

    page = (tmp_path / "page.html").read_text()
    assert page.count("<section") == len({row["class"] for row in found}) and "Most certain" in page
    if CHROMIUM is not None:
        assert all_pictures_shown(page, tmp_path)


def all_pictures_shown(page: str, folder: Path) -> bool:
    """Open a page in a browser; return whether it shows every picture, and is as wide as the window."""
    probe = """<script>addEventListener("load", () => { document.documentElement.dataset.found = JSON.stringify(
        document.documentElement.scrollWidth <= innerWidth &&
        [...document.images].every(image => image.complete && image.naturalWidth > 0)); });</script></body>"""
    (folder / "probed.html").write_text(page.replace("</body>", probe))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                           "--disable-background-networking", "--virtual-time-budget=5000", "--window-size=600,900",
                           f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "probed.html").as_uri()],
                          capture_output=True, text=True, timeout=120, check=True)
    return json.loads(re.search(r'data-found="([^"]*)"', done.stdout).group(1))


def test_bad_input_is_one_line_and_the_remedies_work(checkpoint: Path, npz: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    broken = tmp_path / "broken.pth"
    content = torch.load(checkpoint, weights_only=True)
    content["ema_model"] = {name: value * float("nan") if value.is_floating_point() else value
                            for name, value in content["ema_model"].items()}
    torch.save(content, broken)
    out = tmp_path / "out.csv"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    for load, images, more, message in (
            (checkpoint, tmp_path / "none", [], "there is no"),
            (tmp_path / "none.pth", npz, [], "no such checkpoint"),
            (broken, npz, [], "not finite"),
            (checkpoint, folder, [], "a.png is 8x6, .* classifies images of 8x8; give --resize square"),
            (checkpoint, folder, ["--resize=square"], "b.png: cut short or not an image .*--skip_bad"),
            (checkpoint, folder, [f"--html={folder}/page.html"], "--html .* lies inside --images"),
            (checkpoint, npz, ["--copy"], "--copy belongs to --sort-into")):
        with pytest.raises(UserError, match=message) as error:
            predict(load, images, out, *more)
        assert "\n" not in str(error.value) and not out.exists()
    with pytest.warns(UserWarning, match="b.png: .* it gets no class"):
        predict(checkpoint, folder, out, "--resize=centre", "--skip_bad")
    first, second = rows(out)
    assert first["class"] and second == {**dict.fromkeys(first, ""), "file": "b.png"}
    with pytest.raises(UserError, match="holds other files"):
        predict(checkpoint, folder, out, "--resize=centre", "--skip_bad", f"--sort-into={tmp_path / 'taken'}")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"


# ---------------------------------------------------------------- checkpoints of every program

def daso(balanced: bool) -> tuple[torch.nn.Module, dict]:
    net = SemiModel(WRN(2, 3, 10), 10, balanced)
    average = {f"ema_model.{name}": value.float() for name, value in net.state_dict().items()}
    return net, {"model": net.state_dict(), "ema_model": average, "meta": {"iter": 3}}


def small(net: torch.nn.Module) -> tuple[torch.nn.Module, dict]:
    return net, {"step": 3, "best_acc": 50.0, "model": net.state_dict()}


FORMS = {"DASO": lambda: daso(False), "DASO's second classifier": lambda: daso(True),
         "ConvLarge": lambda: small(ConvLarge(3)), "SmallNet": lambda: small(SmallNet(3)),
         "Shake-Shake": lambda: small(shakeshake26(10))}


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large networks get less padding than users' do."""
    monkeypatch.setattr(classifier, "BLOCK", 4)


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("form", FORMS)
def test_a_published_form_is_found_out_from_the_file(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, content = FORMS[form]()
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match="name the data set it was trained on: --dataset"):
        open_classifier(tmp_path / "model.pth")
    found = open_classifier(tmp_path / "model.pth", dataset="cifar10")
    assert (found.size, found.channels, found.classes, found.resize) == ((32, 32), 3, tuple("0123456789"), None)
    images = np.random.default_rng(0).integers(0, 256, (3, found.channels, 32, 32), np.uint8)
    mean, std = (torch.tensor(values[:found.channels]).view(-1, 1, 1) for values in (found.mean, found.std))
    pixels = (torch.from_numpy(images).float() / 255 - mean) / std
    net.eval()
    with torch.no_grad():
        expected = net.evaluate(pixels) if form.startswith("DASO") else net(pixels)
    torch.testing.assert_close(found.logits(images), expected, rtol=1e-4, atol=1e-5)
    logits, features = found.features(images)
    torch.testing.assert_close(found.head(features).detach(), logits, rtol=1e-4, atol=1e-5)


def test_a_snapshot_of_a_noisy_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = EDMPrecond_classifier(8, 1, 4, model_channels=16).eval()
    save_snapshot(tmp_path / "network-snapshot.pkl", net, {"class_names": ["a", "b", "c", "d"]})
    found = open_classifier(tmp_path / "network-snapshot.pkl")
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), np.uint8)
    with torch.no_grad():
        expected = net(torch.from_numpy(images) / 127.5 - 1, torch.full((2,), 0.01))
    torch.testing.assert_close(found.logits(images), expected, rtol=1e-4, atol=1e-5)
    assert found.classes == ("a", "b", "c", "d") and found.size == (8, 8)


@pytest.mark.usefixtures("few_at_a_time")
def test_photographs_are_resized_as_in_the_evaluation(tmp_path: Path) -> None:
    """Those of MetaSemi as its CentreCrop, those of the learners as their pool."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=3)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "arch": "resnet18", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
                "size": (32, 32), "resize": "centre-edge", "side": 40}, tmp_path / "best.pth")
    found = open_classifier(tmp_path / "best.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 95, 3), np.uint8)
    image = Image.fromarray(pixels)
    for seen in (image, image.resize((32, 32))):  # one of the right size loses its margin, too
        assert np.array_equal(found.prepare(seen, "a"), CentreCrop(32, 40)(seen).transpose(2, 0, 1))
    # Where asked for, as the images were converted.
    (tmp_path / "raw").mkdir()
    image.save(tmp_path / "raw" / "a.png")
    for how, more in (("square", {}), ("centre", {"transform": "center-crop"})):
        convert(tmp_path / "raw", tmp_path / f"{how}.zip", resolution=(32, 32), **more)
        assert np.array_equal(found.prepare(image, "a", how), read_images(tmp_path / f"{how}.zip").images[0])

    torch.save({"ema_model": net.state_dict(), "size": (224, 224), "resize": "square", "options": {
        "net": "resnet18", "net_from_name": True, "depth": 28, "widen_factor": 2, "leaky_slope": 0.1, "dropout": 0.0,
        "bn_momentum": None, "dataset": "imagenet", "num_classes": 3}}, tmp_path / "ours.pth")
    ours = open_classifier(tmp_path / "ours.pth")
    image.save(tmp_path / "a.png")
    one = PhotographSet(np.array([str(tmp_path / "a.png")]), np.array([0]), ("a",), "one")
    pool = PhotographPool(one, ours.mean, ours.std, torch.device("cpu"))
    with torch.no_grad():
        expected = net.eval()(pool.normalised(np.array([0])))
    torch.testing.assert_close(ours.logits(ours.prepare(image, "a")[None]), expected, rtol=1e-4, atol=1e-5)
