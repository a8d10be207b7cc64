"""FreeMatch and its trainer beyond the recorded numbers: order of updates, data options, options files, memory."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from shared.augment.views import normalise
from shared.cli import Diverged, UserError
from shared.data.classes import class_balanced_split
from shared.data.datasets import load_dataset
from shared.distributed import World
from tests.golden.cases import facts
from tests.shared.programs import ROOT, environment
from tests.torchssl import tiny
from tests.torchssl.test_inputs import make_images
from TorchSSL import freematch
from TorchSSL.core.algorithm import Batch, Setting
from TorchSSL.core.data import Batches, channel_statistics, load_training_data
from TorchSSL.core.evaluation import keep_confident, load_classifier, metrics
from TorchSSL.core.labels import CIFAR10_ONE_LABEL_A_CLASS, cifar10_one_label_split
from TorchSSL.core.trainer import Trainer, is_evaluated


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "cache"))


def setting(classes: int = 3) -> Setting:
    return Setting(classes, 100, (1 / classes,) * classes, World())


class Fixed(torch.nn.Module):
    """A network whose logits are its input, so that a test chooses them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_statistics_move_before_the_mask() -> None:
    """With a small momentum the two orders reject different images; the new statistics decide."""
    learner = freematch.FreeMatch(freematch.parse(["--ema_p=0.1"]), setting())
    weak = torch.tensor([[3.0, 0, 0], [1.0, 0.5, 0], [0, 2.0, 0], [0, 0, 0.2]])
    probabilities = weak.softmax(1)
    confidence, label = probabilities.max(1)
    time_p = 0.1 / 3 + 0.9 * confidence.mean()
    p_model = 0.1 / 3 + 0.9 * probabilities.mean(0)
    kept = confidence >= (time_p * p_model / p_model.max())[label]
    assert (confidence >= 1 / 3).all() and not kept.all() and kept.any()
    truth = torch.tensor([0, 1, 1, -1])
    strong = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    batch = Batch(torch.zeros(2, 3), torch.tensor([0, 1]), (weak, strong), torch.arange(4), truth)
    loss, values = learner.loss(Fixed(), batch, 0)
    # A mean over all four images, the rejected ones as zeros.
    wanted = -(strong.log_softmax(1)[torch.arange(4), label] * kept).sum() / 4
    torch.testing.assert_close(values["train/unsup_loss"], wanted)
    torch.testing.assert_close(loss, wanted + torch.log(torch.tensor(3.0)))
    assert values["train/mask_ratio"].item() == pytest.approx(1 - kept.float().mean().item())
    assert values["train/utilisation"].item() == pytest.approx(kept.float().mean().item())
    known = kept & (truth >= 0)
    assert values["train/pseudo_label_acc"].item() == pytest.approx((label == truth)[known].float().mean().item())


def test_soft_labels() -> None:
    learner = freematch.FreeMatch(freematch.parse(["--hard_label=False", "--T=0.5"]), setting())
    weak, strong = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
    batch = Batch(torch.zeros(1, 3), torch.tensor([0]), (weak, strong), torch.arange(5), torch.full((5,), -1))
    _, values = learner.loss(Fixed(), batch, 0)
    kept = weak.softmax(1).amax(1) >= learner.thresholds()[weak.argmax(1)]
    wanted = -((weak / 0.5).softmax(1) * strong.log_softmax(1)).sum(1)
    torch.testing.assert_close(values["train/unsup_loss"], (wanted * kept).mean())


def test_weak_views_carry_no_gradient_of_their_own() -> None:
    learner = freematch.FreeMatch(freematch.parse(["--ent_loss_ratio=0.1"]), setting())
    weak = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    strong = torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    batch = Batch(torch.zeros(1, 3), torch.tensor([0]), (weak, strong), torch.arange(5), torch.full((5,), -1))
    loss, _ = learner.loss(Fixed(), batch, 0)
    loss.backward()
    assert weak.grad.abs().max() == 0 and strong.grad.abs().max() > 0


def test_clipping_bounds_the_step() -> None:
    options = freematch.parse(["--clip=0.001", "--lr=1", "--weight_decay=0", "--momentum=0"])
    net = torch.nn.Linear(3, 3, bias=False)
    before = net.weight.detach().clone()
    trainer = Trainer(net, freematch.FreeMatch(options, setting()), options, World())
    draws = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    trainer.train_step(Batch(draws[0], torch.tensor([0, 1, 2, 0]), (draws[1], draws[2]), torch.arange(4),
                             torch.full((4,), -1)))
    assert (net.weight.detach() - before).norm() == pytest.approx(0.001, rel=1e-3)


def test_evaluation_times() -> None:
    options = freematch.parse([])
    late = int(0.8 * options.num_train_iter)
    assert [i for i in (0, 1, 5000, 7000, late // 5000 * 5000, options.num_train_iter - 1)
            if is_evaluated(i, options)] == [0, 5000, late // 5000 * 5000, options.num_train_iter - 1]
    assert is_evaluated((late // 1000 + 1) * 1000, options) and not is_evaluated(late // 1000 * 1000 - 1000, options)


# ------------------------------------------------------------------------------------------------------------- options

def test_command_line_beats_file_beats_default() -> None:
    Path("run.yaml").write_text("lr: 0.5\nseed: 7\ngpu: None\nload_path: None\nresume: False\n")
    options = freematch.parse(["--c", "run.yaml", "--seed", "9"])
    assert (options.lr, options.seed, options.momentum) == (0.5, 9, 0.9)
    assert options.gpu is None and options.load_path is None and options.resume is False


@pytest.mark.parametrize("name", ["freematch_cifar10_40_1.yaml", "freematch_cifar10_40_1_aug1000.yaml"])
def test_published_configuration(name: str) -> None:
    """The files hold the published keys and values, in order, and every one is understood."""
    wanted = facts("torchssl", "configs.json")[f"(DPT) {name}"]
    file = ROOT / "TorchSSL/config" / name
    assert [tuple(line.split(": ")) for line in file.read_text().splitlines()] == [tuple(pair) for pair in wanted]
    options = freematch.parse(["--c", str(file)])
    assert (options.num_labels, options.num_train_iter, options.weight_decay, options.ema_m) == (40, 2**20, 5e-4, 0.999)
    assert options.given >= {key for key, _ in wanted}


def test_defaults_are_published() -> None:
    options = freematch.parse([])
    for key, text in facts("torchssl", "configs.json")["(DPT) freematch_cifar10_40_1.yaml"]:
        if key not in ("save_name", "overwrite", "use_tensorboard", "dist_url"):
            assert str(getattr(options, key)) == text, key


def test_digits_configurations() -> None:
    first, third = (yaml.safe_load((ROOT / f"TorchSSL/config/freematch_digits_10_1{end}.yaml").read_text())
                    for end in ("", "_aug100"))
    assert {key for key in first if first[key] != third[key]} == {"save_name"} and first.keys() == third.keys()


# ---------------------------------------------------------------------------------------------------------------- data

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
    judge = load_classifier(options.aug_filter, options, extra)
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


# -------------------------------------------------------------------------------------------------------------- output

def test_files_of_a_run() -> None:
    tiny.call("--use_tensorboard")
    folder = Path("saved_models/tiny")
    assert {path.name for path in folder.iterdir()} >= {
        "model_best.pth", "latest_model.pth", "sampled_label_idx.npy", "log.txt", "tensorboard", "stats.jsonl",
        "result.json", "config.json", "data_statistics"}
    assert json.loads((folder / "data_statistics/digits_20.json").read_text()) == {"distribution": [0.1] * 10}
    log = (folder / "log.txt").read_text()
    evaluations = [line for line in log.splitlines() if "BEST_EVAL_ACC" in line]
    assert [int(line.split(" INFO] ")[1].split()[0]) for line in evaluations] == [0, 4, 8, 11]
    assert all(" iteration, USE_EMA: True, {" in line and line.endswith(" iters") for line in evaluations)
    assert "confusion matrix:\n" in log
    result = json.loads((folder / "result.json").read_text())
    accuracies = [float(line.split("'eval/top-1-acc': ")[1].split(",")[0]) for line in evaluations]
    assert result["accuracy"]["last"] == accuracies[-1] and result["accuracy"]["best_on_test"] == max(accuracies)
    assert result["accuracy"]["median_of_last_20"] == np.median(accuracies)
    assert np.sum(result["confusion_matrix"]) == 500 and result["precision"] == "fp32" and result["seconds"] > 0
    assert np.trace(result["confusion_matrix"]) == round(500 * accuracies[-1])
    wanted = facts("torchssl", "log_keys.json")["train_freematch"]["logged_at_evaluation"]
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert all(set(wanted) <= set(line) for line in lines if "eval/loss" in line)
    saved = tiny.checkpoint(Path())
    assert set(facts("torchssl", "checkpoint_facts.json")["keys"]) <= set(saved) and saved["it"] == 11


def test_no_area_under_the_curve_without_all_classes() -> None:
    found = metrics(torch.eye(4), torch.tensor([0, 1, 1, 2]))
    assert "eval/AUC" not in found and found["eval/top-1-acc"] == 0.5 and found["eval/top-5-acc"] == 1.0
    assert metrics(torch.eye(2)[[0, 1, 1, 0]], torch.tensor([0, 1, 0, 0]))["eval/AUC"] == pytest.approx(5 / 6)


def test_diverging_run_stops_and_says_where() -> None:
    with pytest.raises(Diverged, match=r"train/\w+_loss is not finite at step \d+ on rank 0"):
        tiny.call("--lr=1e25", "--momentum=0")
    assert not Path("saved_models/tiny/result.json").exists()


@pytest.mark.parametrize("flag", ["--precision=bf16", "--strict", "--optim=AdamW", "--dropout=0.3",
                                  "--net=WideResNetVar --widen_factor=2 --depth=10"])
def test_other_ways_to_run(flag: str) -> None:
    tiny.call("--num_train_iter=3", *flag.split())
    assert tiny.checkpoint(Path())["finished"]


def test_svhn_learns_its_labels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps on labels alone: initial learning rate, no schedule, and the average starts from their result."""
    class Short(freematch.FreeMatch):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.supervised_steps = 3

    svhn = freematch.FreeMatch(freematch.parse(["--dataset=svhn"]), setting())
    assert svhn.supervised_steps == 2049 and svhn.thresholds().tolist() == pytest.approx([0.9] * 3)
    monkeypatch.setattr(freematch, "FreeMatch", Short)
    tiny.call("--num_train_iter=4")
    saved = tiny.checkpoint(Path())
    assert (saved["step"], saved["it"], saved["scheduler"]["last_epoch"]) == (7, 3, 4)


def test_memory_at_the_published_length() -> None:
    """2^20 iterations: no list of all samples is made, which would take 4 GB here and 17 with the published batches.

    Small batches, since what a network remembers of its batch is not the subject.
    """
    Path("big").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 5_000), ("test", 100)):
        np.savez(f"big/{split}.npz", images=rng.integers(0, 256, (count, 3, 32, 32), np.uint8),
                 labels=np.arange(count) % 10)
    script = Path("measure.py")
    script.write_text("""
from pathlib import Path
from shared.training.run import Run
from TorchSSL import freematch
from TorchSSL.core.trainer import train

def stop(self, total):
    assert total == 2 ** 20
    if self.step == 2:
        # Not getrusage: its peak includes that of the process which started this one.
        print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)
        raise SystemExit(0)

Run._after_step = stop
train(freematch.parse(), freematch.FreeMatch)
""")
    flags = ["--dataset=big", "--depth=10", "--widen_factor=1", "--batch_size=16", "--device=cpu"]
    found = subprocess.run([sys.executable, str(script), *flags], env=environment(), capture_output=True, text=True,
                           check=True, timeout=200)
    assert float(found.stdout.split()[-1]) < 2000


def test_picture_modes_are_kept_apart() -> None:
    """Gray pictures given to a colour set become colour."""
    make_images(Path("set/train"), classes=2, count=2, mode="RGB")
    make_images(Path("set/test"), classes=2, count=2, mode="RGB")
    make_images(Path("extra"), classes=2, count=2, mode="L")
    _, data = data_of("--dataset=set", "--num_labels=2", "--aug_path=extra")
    first = np.asarray(Image.open("extra/0/000000.png"))
    assert (data.labeled.images[2] == first).all() and data.labeled.channels == 3
