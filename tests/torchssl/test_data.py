"""What TorchSSL trains on: labelled split, extra images, images of one's own, and changed images."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.augment.views import normalise
from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.distributed import World
from tests.golden.cases import facts
from tests.torchssl import tiny
from tests.torchssl.test_inputs import make_images
from TorchSSL import freematch
from TorchSSL.core.classifier import open_classifier
from TorchSSL.core.data import Batches, channel_statistics, load_training_data
from TorchSSL.core.evaluation import keep_confident
from TorchSSL.core.labels import CIFAR10_ONE_LABEL_A_CLASS, cifar10_one_label_split, class_balanced_split


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "cache"))


def data_of(*flags: str):  # noqa: ANN201
    options = freematch.parse([*tiny.TINY, *flags])
    return options, load_training_data(options, Path("nowhere"))


def test_labelled_images_are_those_of_the_split() -> None:
    options, data = data_of("--num_labels=20", "--seed=3")
    train = load_dataset("digits", "train")
    index = class_balanced_split(train.labels, 20, 10, 3)
    assert np.array_equal(data.labeled_index, index) and np.array_equal(data.labeled.images, train.images[index])
    assert np.bincount(data.labeled.labels).tolist() == [2] * 10
    assert len(data.unlabeled) == len(train) == 1297 and len(data.test) == 500


def test_published_ten_labels_of_cifar10() -> None:
    assert cifar10_one_label_split(0).tolist() == [4255, 6446, 8580, 11759, 12598, 29349, 29433, 33759, 35345, 38639]
    assert len({frozenset(row) for row in CIFAR10_ONE_LABEL_A_CLASS}) == 8
    with pytest.raises(UserError, match="seeds 0 to 7"):
        cifar10_one_label_split(8)


def test_label_file_names_the_labelled_images() -> None:
    np.save("chosen.npy", np.array([5, 3, 8], np.int32))
    _, data = data_of("--label_idx=chosen.npy")
    assert data.labeled_index.tolist() == [5, 3, 8] and data.labeled_index.dtype == np.int64


def test_extra_images_by_class_number() -> None:
    """Folders 0..11 are the classes of these numbers (as text, 10 would come before 2)."""
    make_images(Path("set/train"), classes=12, count=3)
    make_images(Path("set/test"), classes=12, count=1)
    make_images(Path("extra"), classes=12, count=4, mode="RGB")
    _, data = data_of("--dataset=set", "--num_labels=12", "--aug_path=extra")
    assert data.labeled.labels[12:].tolist() == [label for label in range(12) for _ in range(4)]
    assert data.num_real == 12 and data.labeled.channels == 1  # colour images become gray, like the set
    assert "augmentation dataset is added" in data.notes


def test_share_of_real_images() -> None:
    make_images(Path("extra"), count=30)
    options, data = data_of("--aug_path=extra", "--batch_size=8")

    def real(options: object) -> list[int]:
        batches = Batches(data, options, World(), ("weak", "strong"), 8)
        return [int((batches.labeled_positions(step) < data.num_real).sum()) for step in range(200)]

    assert 0.2 < np.mean(real(options)) < 1.2  # uniform: 8 * 20 / 320 = 0.5
    options.real_fraction = 0.5
    assert set(real(options)) == {4}
    options.real_fraction = 0.3
    assert set(real(options)) == {2, 3} and 2.2 < np.mean(real(options)) < 2.6
    options.real_fraction = 1.0
    assert set(real(options)) == {8}


def test_confident_extra_images_are_kept() -> None:
    """Kept are the images to whose folder's class the classifier gives the probability asked for."""
    tiny.call("--num_train_iter=3")
    make_images(Path("extra"), count=6)
    options, data = data_of("--aug_path=extra", "--aug_filter=saved_models/tiny/model_best.pth")
    extra = data.labeled.subset(slice(20, None))
    judge = open_classifier(options.aug_filter)
    with torch.no_grad():
        logits = judge.net(normalise(torch.from_numpy(extra.images), data.mean, data.std))
    confidence = logits.softmax(1)[torch.arange(60), torch.from_numpy(extra.labels)].numpy()
    options.aug_confidence = float(np.median(confidence))
    kept = keep_confident(data, options, World())
    wanted = extra.images[confidence >= options.aug_confidence]
    assert len(wanted) == 30 and np.array_equal(kept.labeled.images, np.concatenate([data.labeled.images[:20], wanted]))
    options.aug_confidence = 0.0
    assert len(keep_confident(data, options, World()).labeled) == 80
    options.aug_confidence = 1.0
    with pytest.raises(UserError, match="none of the 60 images"):
        keep_confident(data, options, World())


def own_set(partial: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 100, (40, 3, 12, 12), np.uint8)
    labels = np.arange(40) % 4
    labels[20:] = -1 if partial else labels[20:]
    Path("own").mkdir()
    np.savez("own/train.npz", images=images, labels=labels, classes=np.array(["a", "b", "c", "d"]))
    np.savez("own/test.npz", images=images[:8], labels=np.arange(8) % 4, classes=np.array(["a", "b", "c", "d"]))


def test_own_images_with_partial_labels() -> None:
    own_set(partial=True)
    _, data = data_of("--dataset=own", "--num_labels=8")
    assert data.num_classes == 4 and (data.labeled_index < 20).all() and len(data.unlabeled) == 40
    assert (data.unlabeled.labels[20:] == -1).all()
    pixels = data.unlabeled.images / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-6)
    _, every = data_of("--dataset=own", "--num_labels=0")
    assert every.labeled_index.tolist() == list(range(20))


def test_own_images_end_to_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, label and evaluate a user's own set; the network and its normalisation come from the checkpoint."""
    from TorchSSL import eval as evaluation_script
    from TorchSSL import get_labels

    own_set(partial=True)
    tiny.call("--dataset=own", "--num_labels=8", "--num_train_iter=4")
    said = capsys.readouterr().out
    assert "4 classes, images 3 x 12 x 12" in said and "8 test images are also in train" in said
    monkeypatch.setattr("sys.argv", ["eval.py", "--load_path=saved_models/tiny/latest_model.pth", "--json=found.json"])
    evaluation_script.main()
    last = capsys.readouterr().out.splitlines()[-1]
    accuracy = json.loads(Path("saved_models/tiny/result.json").read_text())["accuracy"]["last"]
    assert last == f"Test Accuracy: {accuracy}"
    assert json.loads(Path("found.json").read_text())["eval/top-1-acc"] == accuracy
    monkeypatch.setattr("sys.argv", ["get_labels.py", "--load_path=saved_models/tiny/latest_model.pth",
                                     "--save_path=out", "--label_idx=saved_models/tiny/sampled_label_idx.npy"])
    get_labels.main()
    labels = np.load("out/pseudo_label.npy")
    chosen = np.load("saved_models/tiny/sampled_label_idx.npy")
    assert labels.dtype == np.int64 and labels.shape == (40,)
    assert np.array_equal(labels[chosen], chosen % 4)
    report = json.loads(Path("out/pseudo_label.json").read_text())
    assert report["true_labels_known"] == 20 and report["true_labels_injected"] == 8
    assert report["agreement"] == np.mean(labels[:20] == np.arange(20) % 4)
    assert capsys.readouterr().out.splitlines()[-1] == f"Test Accuracy: {report['agreement']}"


def test_changed_images_are_another_run() -> None:
    """The same command on images that changed since is an error, or with --overwrite a new run beside the old one."""
    flags = ("--dataset=own", "--num_labels=8", "--num_train_iter=2")
    own_set(partial=False)
    tiny.call(*flags)
    with np.load("own/test.npz") as file:
        content = dict(file)
    np.savez("own/test.npz", **{**content, "images": content["images"] + 1})
    with pytest.raises(UserError, match="the content of --dataset has changed"):
        tiny.call(*flags)
    tiny.call(*flags, "--overwrite")
    assert Path("saved_models/tiny.replaced-1/latest_model.pth").exists()


def test_unlabelled_part_stands_before_the_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in STL-10: unlabelled are both, labels come from the training images, and so do the indices."""
    from TorchSSL import get_labels

    own_set(partial=False)
    np.savez("own/unlabeled.npz", images=np.full((7, 3, 12, 12), 50, np.uint8), labels=np.zeros(7, np.int64))
    _, data = data_of("--dataset=own", "--num_labels=8")
    assert len(data.unlabeled) == 47 and data.unlabeled.labels.tolist() == [-1] * 7 + [n % 4 for n in range(40)]
    assert np.array_equal(data.labeled.images, data.unlabeled.images[7:][data.labeled_index])
    tiny.call("--dataset=own", "--num_labels=8", "--num_train_iter=2")
    monkeypatch.setattr("sys.argv", ["get_labels.py", "--load_path=saved_models/tiny/latest_model.pth",
                                     "--save_path=out", "--label_idx=saved_models/tiny/sampled_label_idx.npy"])
    get_labels.main()
    labels, chosen = np.load("out/pseudo_label.npy"), np.load("saved_models/tiny/sampled_label_idx.npy")
    assert len(labels) == 47 and np.array_equal(labels[7:][chosen], chosen % 4)


def test_statistics_are_published_where_there_are_any() -> None:
    for name, values in facts("torchssl", "normalisation.json")["mean"].items():
        mean, std = channel_statistics(name, None)
        np.testing.assert_allclose(mean, values)
        np.testing.assert_allclose(std, facts("torchssl", "normalisation.json")["std"][name])


def test_picture_modes_are_kept_apart() -> None:
    """Gray pictures given to a colour set become colour."""
    make_images(Path("set/train"), classes=2, count=2, mode="RGB")
    make_images(Path("set/test"), classes=2, count=2, mode="RGB")
    make_images(Path("extra"), classes=2, count=2, mode="L")
    _, data = data_of("--dataset=set", "--num_labels=2", "--aug_path=extra")
    first = np.asarray(Image.open("extra/0/000000.png"))
    assert (data.labeled.images[2] == first).all() and data.labeled.channels == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_labels_from_a_list_that_was_filled_in(tmp_path: Path) -> None:
    """Four images of 20 have a label; the others are the unlabelled pool; the test images are matched by name."""
    for name in [*(f"train/{number:02d}" for number in range(20)), "test/owl/1", "test/cat/1"]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), len(name)).save(tmp_path / "set" / f"{name}.png")
    rows = "".join(f"train/{number:02d}.png,{number},{('owl', 'cat')[number % 2] if number < 4 else ''}\n"
                   for number in range(20))
    (tmp_path / "label_these.csv").write_text(f"file,rank,label\n{rows}")
    options = freematch.parse([f"--dataset={tmp_path}/set", f"--labels={tmp_path}/label_these.csv", "--num_labels=0"])
    data = load_training_data(options, tmp_path / "run")
    assert data.labeled_index.tolist() == [0, 1, 2, 3] and data.labeled.labels.tolist() == [1, 0, 1, 0]
    assert len(data.unlabeled) == 20 and data.unlabeled.classes == data.test.classes == ("cat", "owl")
    assert data.test.labels.tolist() == [0, 1]
