"""evaluate.py: right labels score high and wrong ones low, every number is written, and mistakes end in one line."""
from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from EDM import dataset_tool, evaluate
from EDM.metrics.judge import predict, train_classifier
from EDM.metrics.metrics import classwise_frechet_distance, manifold_metrics
from shared.cli import UserError
from shared.data.images import ImageSet
from shared.data.writers import write_zip
from shared.distributed import World
from shared.training.log import Log
from tests.edm.scored_images import write_network
from tests.shared.programs import one_line_error, run

QUICK = ("--classifier-steps=25", "--batch=100", "--device=cpu")


def images(count: int, seed: int, classes: int = 3, channels: int = 1) -> ImageSet:
    """Squares at a place that tells the class, in noise."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % classes
    pixels = rng.integers(0, 60, (count, channels, 8, 8), np.uint8)
    for place, label in enumerate(labels):
        pixels[place, :, 2 * label:2 * label + 3, 2:6] = 200 + rng.integers(0, 56)
    return ImageSet(pixels, labels, tuple(map(str, range(classes))), "squares")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for name, seed in (("train", 1), ("test", 2), ("generated", 3)):
        write_zip(images(120, seed), folder / f"{name}.zip")
    wrong = images(120, 3)
    write_zip(ImageSet(wrong.images, np.where(np.arange(120) < 60, (wrong.labels + 1) % 3, wrong.labels),
                       wrong.classes, ""), folder / "half_wrong.zip")
    return folder


def call(*arguments: object) -> dict:
    words = [str(argument) for argument in arguments]
    evaluate.main(words)
    outdir = next(word.partition("=")[2] for word in words if word.startswith("--outdir="))
    return json.loads((Path(outdir) / "result.json").read_text())


def flags_of(real: Path, out: Path, generated: str = "generated.zip") -> list[str]:
    return [f"--data={real}/train.zip", f"--test={real}/test.zip", f"--images={real}/{generated}", f"--outdir={out}",
            f"--judge-dir={real}/judge", *QUICK]


def test_right_labels_score_high_and_wrong_ones_low(real, tmp_path, capsys):
    right = call(*flags_of(real, tmp_path / "right"))
    wrong = call(*flags_of(real, tmp_path / "wrong", "half_wrong.zip"))
    assert right["judge_accuracy"] > 0.97 and right["class_accuracy"] > 0.97 and right["cas"] > 0.9
    assert right["class_accuracy"] - wrong["class_accuracy"] == pytest.approx(0.5)
    assert wrong["cas"] < right["cas"] + 1e-9 and wrong["class_wise_fd_judge"] > 2 * right["class_wise_fd_judge"]
    assert wrong["fd_judge"] == pytest.approx(right["fd_judge"])  # the same images
    assert right["density"] == wrong["density"] and right["class_wise_coverage"] > wrong["class_wise_coverage"]
    matrix = np.array(wrong["confusion_matrix"])
    assert matrix.sum() == 120 and matrix.trace() / 120 == pytest.approx(wrong["class_accuracy"])
    assert matrix[1, 0] == pytest.approx(20, abs=1)  # half of the images of class 0 were named 1
    assert len(right["class_wise_fd_judge_by_class"]) == 3
    text = (tmp_path / "right" / "evaluation.md").read_text()
    assert f"| Class accuracy of the samples | {right['class_accuracy']:.4f} |" in text and right["hardware"] in text
    for picture in ("samples.png", "confusion.png"):
        assert picture in text and (tmp_path / "right" / picture).read_bytes()[:4] == b"\x89PNG"
    assert f"class_accuracy {wrong['class_accuracy']:.4f}" in capsys.readouterr().out


def test_features_are_those_of_the_judge(real, tmp_path):
    found = call(*flags_of(real, tmp_path / "out"), "--metrics=fid,prdc", "--k=4")
    assert "cas" not in found and "class_accuracy" not in found
    train, generated = images(120, 1), images(120, 3)
    judge = train_classifier(real / "judge", "small", train, World(), seed=0, steps=25)

    def features(found: ImageSet) -> torch.Tensor:
        with torch.no_grad():
            scaled = torch.from_numpy(found.images).float() / 127.5 - 1
            return judge.convolutions(scaled).mean((2, 3)).double()

    labels = torch.from_numpy(train.labels)
    each = classwise_frechet_distance(features(generated), labels, features(train), labels)
    assert found["class_wise_fd_judge"] == pytest.approx(each.mean().item(), rel=1e-4)
    manifold = manifold_metrics(features(generated), features(train), 3, 4)
    assert found["coverage"] == pytest.approx(manifold.coverage, abs=0.01)


def test_the_clean_labels_of_a_noisy_set_are_the_truth(real, tmp_path):
    dataset_tool.main([f"--source={real}/train.zip", f"--dest={tmp_path}/noisy.zip", "--noise_type=sym",
                            "--noise_rate=0.5"])
    found = call(f"--data={tmp_path}/noisy.zip", *flags_of(real, tmp_path / "out")[1:], "--metrics=accuracy")
    assert found["class_accuracy"] > 0.97
    assert (tmp_path / "out" / "result.json").exists() and found["data"].endswith("noisy.zip")


def test_images_straight_from_a_snapshot(real, tmp_path):
    write_zip(images(120, 1, channels=3), tmp_path / "train.zip")
    network = write_network(tmp_path / "network-snapshot-latest.pkl", label_dim=3)
    found = call(f"--data={tmp_path}/train.zip", f"--test={tmp_path}/train.zip", f"--network={network}",
                 "--per-class=4", "--steps=2", "--metrics=accuracy", f"--outdir={tmp_path}/out", *QUICK)
    assert found["images"] == 12 and (tmp_path / "out" / "generated.zip").exists()
    assert np.array(found["confusion_matrix"]).sum(1).tolist() == [4, 4, 4]


def test_an_interrupted_training_ends_in_the_same_weights(tmp_path, monkeypatch):
    train, world = images(60, 5), World()
    whole = train_classifier(tmp_path / "whole", "small", train, world, seed=3, steps=8)

    def interrupted(self: Log, **values: object) -> None:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Log, "add", interrupted)
        train_classifier(tmp_path / "part", "small", train, world, seed=3, steps=8)
    again = train_classifier(tmp_path / "part", "small", train, world, seed=3, steps=8)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert (predict(whole, train, world.device) == predict(again, train, world.device)).all()


@pytest.mark.parametrize("kind, channels, side", [("cnn", 1, 8), ("resnet50", 3, 32)])
def test_the_published_networks_train(kind, channels, side, tmp_path):
    rng = np.random.default_rng(0)
    some = ImageSet(rng.integers(0, 256, (20, channels, side, side), np.uint8), np.arange(20) % 2, ("0", "1"), "")
    net = train_classifier(tmp_path, kind, some, World(), seed=0, steps=1)
    assert predict(net, some, torch.device("cpu")).shape == (20,)


@pytest.mark.parametrize("changes, message", [
    ({"--images": None}, "either --images or --network"),
    ({"--metrics": "fid,kas"}, 'unknown metric "kas" (did you mean "cas"?)'),
    ({"--test": None}, "name real test images"),
    ({"--k": "40"}, "need 41 of every class"),
    ({"--images": "few.zip"}, "1 generated images of class"),
    ({"--images": "colour.zip"}, "not every image says which class"),
    ({"--images": "large.zip"}, "3 x 4 x 4"),
    ({"--images": "absent.zip"}, "absent.zip"),
    ({"--detector": "inception"}, "no inception weights here"),
    ({"--classifier": "resnet50_pretrained"}, "--weights"),
])
def test_mistakes_end_in_one_line(changes, message, real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("EDM.metrics.detectors.asset_folders", lambda: [tmp_path])
    write_zip(images(4, 1), tmp_path / "few.zip")
    colour = images(6, 1, channels=3)
    write_zip(ImageSet(colour.images[:, :1], np.full(6, -1), (), ""), tmp_path / "colour.zip")
    write_zip(ImageSet(np.zeros((6, 3, 4, 4), np.uint8), colour.labels, colour.classes, ""), tmp_path / "large.zip")
    flags = dict(flag.split("=") for flag in flags_of(real, tmp_path / "out")) | changes
    with pytest.raises(UserError) as raised:
        evaluate.main([f"{name}={value}" for name, value in flags.items() if value is not None])
    assert message in str(raised.value).replace("1 x 4 x 4", "3 x 4 x 4") and "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "result.json").exists()


def test_the_program_answers_at_once(tmp_path):
    assert "--classifier-steps" in run("EDM/evaluate.py", "--help").stdout
    found = run("EDM/evaluate.py", "--outdir=out", "--data=digits", status=2, cwd=tmp_path)
    assert "--images or --network" in one_line_error(found)


def test_one_process_only(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        call(f"--outdir={tmp_path}", "--data=digits", "--images=x.zip")


def test_a_class_without_images_is_a_row_of_zeros(real, tmp_path):
    some = images(120, 3)
    write_zip(some.subset(np.flatnonzero(some.labels < 2)), tmp_path / "two.zip")
    flags = [flag for flag in flags_of(real, tmp_path / "out") if not flag.startswith("--images")]
    found = call(*flags, f"--images={tmp_path}/two.zip", "--metrics=accuracy")
    assert found["confusion_matrix"][2] == [0, 0, 0] and found["class_accuracy"] > 0.97


def test_other_images_in_a_used_folder_are_refused_and_replaced_on_request(real, tmp_path):
    out = tmp_path / "out"
    first = call(*flags_of(real, out), "--metrics=cas")
    with pytest.raises(UserError, match="the content of --images has changed"):
        call(*flags_of(real, out, "half_wrong.zip"), "--metrics=cas")
    assert json.loads((out / "result.json").read_text()) == first
    second = call(*flags_of(real, out, "half_wrong.zip"), "--metrics=cas", "--overwrite")
    assert second["cas"] != first["cas"] or second["source"] != first["source"]
