"""FreeMatch and its trainer beyond the recorded numbers: order of updates, options files, outputs, memory."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from shared.cli import Diverged
from shared.distributed import World
from tests.golden.cases import facts
from tests.shared.programs import ROOT, environment
from tests.torchssl import tiny
from TorchSSL import freematch
from TorchSSL.core.algorithm import Batch, Setting
from TorchSSL.core.evaluation import metrics
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
