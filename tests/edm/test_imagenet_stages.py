"""Stages 1 and 3 of DPT on ImageNet, by their commands, on a few photographs."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from EDM.imagenet import train_classifier
from EDM.imagenet.experiment.config import read_config
from EDM.imagenet.experiment.images import training_images, validation_images
from EDM.imagenet.experiment.layout import Layout
from shared.cli import UserError
from tests.golden.cases import fill
from tests.shared.programs import ROOT, one_line_error, run
from TorchSSL.encoders.classifier import read_classifier
from TorchSSL.encoders.features import read_features
from TorchSSL.encoders.vit import VisionTransformer

CONFIG = ROOT / "EDM/imagenet/configs/accelerate_b4_subset1_2img_k_128_large.py"
FLAGS = [f"--config={CONFIG}", "--config.image_path=images", "--config.subset_path=list.txt",
         "--config.fname=tiny.pth.tar", "--config.model_name=tiny", "--config.augmentation_K=2", "--device=cpu"]
SETTINGS = dict(image_path="images", subset_path="list.txt", fname="tiny.pth.tar", model_name="tiny", augmentation_K=2)
CLASSES = ("cat", "dog", "owl")


def layout() -> Layout:
    config = read_config(CONFIG)
    config.update(SETTINGS)
    return Layout(config)


def picture(path: Path, label: int, seed: int) -> None:
    rng = np.random.default_rng(10 * label + seed)
    pixels = np.clip(80 * label + rng.integers(0, 90, (40 + seed, 50, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to type commands in: photographs whose base names are the same in every class, a list, an encoder."""
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(CLASSES):
        for number in range(4):
            picture(Path(f"images/train/{name}/{number}.png"), label, number)
            picture(Path(f"images/val/{name}/{number}.png"), label, 4 + number)
        for number in range(2):
            picture(layout().generated / name / f"{number}.png", label, 20 + number)
    picture(Path("images/unlabeled/more/0.png"), 1, 30)
    Path("list.txt").write_text("".join(f"{name}/1.png\n" for name in reversed(CLASSES)))
    architecture = dict(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=4, mlp_ratio=2)
    Path("pretrained").mkdir()
    torch.save({"target_encoder": fill(VisionTransformer(**architecture)).state_dict(), "architecture": architecture},
               "pretrained/tiny.pth.tar")
    return tmp_path


def do(name: str, *flags: str) -> None:
    train_classifier.main([*FLAGS, f"--func={name}", *flags])


def test_the_five_functions(folder, capsys):
    for name in train_classifier.FUNCTIONS:
        do(name, "--config.output_path=log/classifier")
    found = layout()
    names = json.loads(Path(f"{found.pseudo_labels}.json").read_text())
    predicted = dict(zip(torch.load(found.image_paths), np.load(found.pseudo_labels).tolist(), strict=True))
    assert set(predicted) == {f"train/{name}/{number}.png" for name in CLASSES for number in range(4)} | {
        "unlabeled/more/0.png"}
    true = [CLASSES.index(name.split("/")[1]) if name.startswith("train") else -1 for name in predicted]
    assert torch.load(found.true_labels).tolist() == true
    assert names["accuracy"] == np.mean([p == t for p, t in zip(predicted.values(), true, strict=True) if t >= 0])
    assert torch.load(found.image_names)[:2] == ["0.png", "1.png"]
    probabilities = torch.load(found.pseudo_probabilities)
    assert ((1 / 3 < probabilities) & (probabilities <= 1)).all()
    assert read_features(found.train_features).names == [f"train/{name}/1.png" for name in reversed(CLASSES)]
    third = json.loads(Path(f"{found.classifier_stage3}.json").read_text())
    assert third["rows"] == {"generated": 6, "labelled": 3} and third["test_images"] == 12
    text = Path("log/classifier").read_text()
    assert text.count("test score: ") == 2 and "pseudo-label accuracy: " in text

    do("train_classifier_stage3", "--rows=real")
    control = found.classifier_stage3.with_name(f"{found.classifier_stage3.stem}-real.pkl.json")
    assert json.loads(control.read_text())["rows"] == {"real": 13, "labelled": 3}

    capsys.readouterr()
    for name in train_classifier.FUNCTIONS:
        do(name)
    assert capsys.readouterr().out.count("complete: ") == 6
    # Without the labelled rows; what was made of something else is not passed off as new.
    with pytest.raises(UserError, match="made by .* from something else .*give --overwrite"):
        do("train_classifier_stage3", "--config.using_true_label=False")
    do("train_classifier_stage3", "--config.using_true_label=False", "--overwrite")
    assert json.loads(Path(f"{found.classifier_stage3}.json").read_text())["rows"] == {"generated": 6}


def test_two_processes_are_one(folder):
    do("train_classifier_stage1")
    one = read_features(layout().train_features)
    weights, values = read_classifier(layout().classifier).weights, one.values.copy()
    for file in (layout().train_features, layout().val_features, layout().classifier):
        file.unlink()
    run("EDM/imagenet/train_classifier.py", *FLAGS, "--func=train_classifier_stage1", "--batch-size=2", cwd=folder,
        ranks=2)
    two = read_features(layout().train_features)
    np.testing.assert_allclose(two.values, values, atol=1e-5)
    assert two.names == one.names
    torch.testing.assert_close(read_classifier(layout().classifier).weights, weights, rtol=1e-3, atol=1e-3)


def flat() -> None:
    """Make val flat, as ImageNet is downloaded."""
    for name in CLASSES:
        for path in sorted(Path("images/val", name).iterdir()):
            path.rename(f"images/val/{name}{path.name}")
        Path("images/val", name).rmdir()


def test_flat_validation_images_follow_the_official_list(folder):
    config = read_config(CONFIG)
    config.update(SETTINGS)
    classes = training_images(config).classes
    images = validation_images(config, classes)
    wanted = {name.removeprefix("val/").replace("/", ""): label
              for name, label in zip(images.names, images.labels.tolist(), strict=True)}
    flat()
    with pytest.raises(UserError, match="its 12 images lie in no class folders; move them .*LOC_val_solution.csv"):
        validation_images(config, classes)
    Path("images/LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(
        f"{name}{number},{name} 1 2 3 4\n" for name in CLASSES for number in range(4)))
    images = validation_images(config, classes)
    assert {Path(name).name: label for name, label in zip(images.names, images.labels.tolist(), strict=True)} == wanted


def listed(*lines: str) -> None:
    Path("list.txt").write_text("\n".join(lines) + "\n")


def without_a_tensor() -> None:
    content = torch.load("pretrained/tiny.pth.tar", weights_only=True)
    del content["target_encoder"]["norm.weight"]
    torch.save(content, "pretrained/tiny.pth.tar")


@pytest.mark.parametrize("change, flags, message", [
    (lambda: None, ["--func=get_cluster"], "no such file of features"),
    (lambda: None, ["--config.penalty=l1"], "penalty: expected 'l2'"),
    (lambda: None, ["--config.model_name=deit_tiny"], "width 32 with 1 blocks and patches of 16, not deit_tiny"),
    (lambda: None, ["--config.fname=absent.pth"], "pretrained/absent.pth: no such encoder"),
    (lambda: None, ["--config.subset_path=absent.txt"], "there is no file absent.txt"),
    (lambda: None, ["--config.image_path=absent"], "absent/train/<class>/ not found"),
    (without_a_tensor, [], "the tensor norm.weight is missing"),
    (flat, [], "its 12 images lie in no class folders"),
    (lambda: listed("cat/1.png", "cow/1.png"), [], "list.txt, line 2: 'cow/1.png' is of the class 'cow', which is no"),
    (lambda: listed("cat/1.png", "cat/9.png"), [], "list.txt, line 2: there is no image train/cat/9"),
    (lambda: listed("cat/1.png", "", "dog/1.png"), [], "list.txt, line 2: is blank"),
    (lambda: listed("cat/1.png", "cat/1.png"), [], "list.txt, line 2: cat/1.png was named before"),
])
def test_mistakes_end_in_one_line(folder, change, flags, message):
    change()
    flags = flags if any(flag.startswith("--func") for flag in flags) else ["--func=train_classifier_stage1", *flags]
    with pytest.raises(UserError) as error:
        train_classifier.main([*FLAGS, *flags])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(Path("pretrained").rglob("*.pkl"))


def test_an_unknown_function_ends_in_one_line(folder):
    result = run("EDM/imagenet/train_classifier.py", *FLAGS, "--func=train_classifier_stage4", cwd=folder, status=2)
    assert "'train_classifier_stage4' is not one of" in one_line_error(result)


def test_a_class_without_a_labelled_image_is_warned_of(folder):
    listed("cat/1.png", "dog/1.png")
    with pytest.warns(UserWarning, match=r"no labelled image of 1 of 3 classes \(owl\)"):
        do("train_classifier_stage1")
    do("get_all_features")
    with pytest.warns(UserWarning, match=r"no pseudo-label of 1 of 3 classes \(owl\)"):
        do("get_cluster")
