"""What does not fit ends in one line that names it, before anything is written."""
from __future__ import annotations

import os
import pickle
import resource
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from MetaSemi.core import options as command_line
from MetaSemi.core.data import SmallImages
from MetaSemi.train_baseline import parse as parse_baseline
from MetaSemi.train_meta import parse as parse_meta
from shared.cli import UserError
from shared.distributed import World
from shared.training.run import Run
from tests.metasemi import tiny
from tests.shared.programs import one_line_error, run

SWITCHES = {"--mix-up", "--gpu"}


@pytest.mark.parametrize("flags, words", [
    (["--dataset=cifar11"], "cifar11"), (["--num-label=9"], "--num-label 9: cifar10 has 10 classes"),
    (["--milestones=__import__('os')"], "'--milestones': .* is not a list like"),
    (["--milestones=[1, 'a']"], "'--milestones': .* is not a list like"),
    (["--milestones=[-3]"], "'--milestones': -3 is not in the range x>=0"),
    (["--alpha=0"], "--alpha"), (["--epsilon=nan"], "--epsilon"), (["--batch-size=0"], "0 is not in the range x>=1"),
    (["--total-steps=5", "--start-step=5"], "must be less than --total-steps 5"),
    (["--dataset=digits"], "give -a small"), (["-a=small"], "-a small is for the digits"),
    (["-a=resnet"], "resnet"), (["--mixup"], "--mix-up"), (["--strict", "--precision=bf16"], "--strict is fp32"),
])
def test_wrong_flags(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        parse_meta(flags)


def test_published_defaults() -> None:
    wanted = {"dataset": "cifar10", "data_path": "./data", "num_label": 4000, "architecture": "convlarge",
              "mix_up": False, "alpha": 1.0, "weight": 1.0, "total_steps": 400000, "start_step": 0, "batch_size": 128,
              "epsilon": 1e-2, "lr": 0.1, "warmup": 4000, "gamma": 0.1, "milestones": (300000, 350000),
              "weight_decay": 1e-4, "momentum": 0.9, "num_workers": 4, "resume": None, "seed": 1234,
              "print_freq": 100, "test_freq": 400, "save_path": "./results/tmp", "gpu": False}
    assert {key: getattr(parse_meta([]), key) for key in wanted} == wanted
    baseline = parse_baseline([])
    assert {key: getattr(baseline, key) for key in wanted if hasattr(baseline, key)} == {
        key: value for key, value in wanted.items() if key not in ("weight", "epsilon")}
    assert parse_meta(["--dataset=cifar100"]).num_classes == 100
    assert parse_meta(["--milestones=[2, 4]"]).milestones == parse_meta(["--milestones", "2,4"]).milestones == (2, 4)
    assert parse_meta(["--milestones=[]"]).milestones == ()


def test_nothing_of_the_method_is_left_out() -> None:
    """A changed flag is either known to leave the numbers alone, or keeps a run from being continued."""
    options = parse_meta([])
    assert set(options.method) == {*vars(options), "script"} - command_line.NOT_THE_METHOD - {"method"}


@pytest.mark.parametrize("flags, words", [
    (["--dataset=cifar10", "-a=convlarge"], "cifar-10-batches-py/ or cifar-10-python.tar.gz not found"),
    (["--gpu"], "this machine"), (["--resume=nowhere.pth"], "--resume: there is no file nowhere.pth"),
])
def test_missing(flags: list[str], words: str, tmp_path: Path) -> None:
    result = run("MetaSemi/train_meta.py", *tiny.TINY, "--save-path=run", *flags, cwd=tmp_path, status=2)
    assert words in one_line_error(result)
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(b"PK\3\4 nothing")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}, "step": 3, "best_acc": 1.0, "optimizer": {}},
               tmp_path / "foreign.pth")
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"model": print}, file)
    for name in ("cut", "other", "foreign", "evil"):
        tiny.run(tmp_path, f"--resume={name}.pth", status=2)
    lines = [line for line in tiny.errors(tmp_path).splitlines() if line.startswith("error: ")]
    for line, words in zip(lines, ("cut short or damaged", "holds no model", "does not fit", "refused"), strict=True):
        assert words in line
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_diverged_run_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    tiny.run(tmp_path, "--lr=1e30", "--warmup=0", status=1)
    assert "is not finite at step" in tiny.errors(tmp_path)


def cifar_form(folder: Path, classes: int, count: int) -> None:
    """Write tiny files in the form of CIFAR-10 (classes 10) or CIFAR-100."""
    rng = np.random.default_rng(0)
    name, key = ("cifar-10-batches-py", "labels") if classes == 10 else ("cifar-100-python", "fine_labels")
    (folder / name).mkdir()
    files = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    for file in files:
        content = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
                   key: [int(label) for label in np.arange(count) % classes]}
        (folder / name / file).write_bytes(pickle.dumps(content, protocol=2))


def svhn_form(folder: Path, count: int) -> None:
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        savemat(folder / f"{split}_32x32.mat", {"X": rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
                                                "y": (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]})


PUBLISHED = {
    "svhn": '--dataset svhn --num-label 1000 -a convlarge --mix-up --alpha 0.1 --save-path results/svhn --seed 7788 '
            '--weight-decay 5e-5',
    "cifar10": '--dataset cifar10 --num-label 4000 -a convlarge --mix-up --alpha 1.0 --save-path results/cifar-10 '
               '--seed 8469 --weight-decay 1e-4',
    "cifar100": '--dataset cifar100 --num-label 10000 -a convlarge --mix-up --alpha 1.0 --save-path results/cifar-100 '
                '--seed 7788 --weight-decay 1e-4',
}


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_published_commands_on_tiny_files(dataset: str, tmp_path: Path) -> None:
    """The README's commands, made small, on files in the form of the published ones."""
    (tmp_path / "data").mkdir()
    if dataset == "svhn":
        svhn_form(tmp_path / "data", 40)
    else:
        cifar_form(tmp_path / "data", int(dataset[5:]), 200 if dataset == "cifar100" else 20)
    command = [*PUBLISHED[dataset].split(), "--batch-size=2", "--total-steps=2", "--print-freq=1"]
    labels = 100 if dataset == "cifar100" else 10
    result = run("MetaSemi/train_meta.py", *command, f"--num-label={labels}", cwd=tmp_path)
    folder = tmp_path / command[command.index("--save-path") + 1]
    assert "Step 00001 Dtime: " in result.stdout and "Best Accuracy: " in result.stdout
    assert len((folder / "label_indices.txt").read_text().splitlines()) == labels
    assert torch.load(folder / "model_best.pth", weights_only=True)["step"] == 2


def die_with_peak(step: int, file: Path) -> None:
    """From now on, write the most memory that this process has had, in bytes, and die behind step `step`."""
    def killed(self: Run, total: int) -> None:
        if self.step == step:
            file.write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
            os.kill(os.getpid(), signal.SIGKILL)

    Run._after_step = killed


@pytest.mark.slow
def test_published_command_of_cifar10_takes_less_than_two_gigabytes(tmp_path: Path) -> None:
    """ConvLarge, 50,000 images, batches of 128, 400,000 steps, of which two are done."""
    (tmp_path / "data").mkdir()
    cifar_form(tmp_path / "data", 10, 10_000)
    published = [*PUBLISHED["cifar10"].split(), "--batch-size=128", "--total-steps=400000", "--save-path=run"]
    tiny.run(tmp_path, *published, sabotage=partial(die_with_peak, 2, tmp_path / "peak"), status=-signal.SIGKILL)
    assert 1e9 < int((tmp_path / "peak").read_text()) < 2e9


def test_more_labels_than_images(tmp_path: Path) -> None:
    tiny.run(tmp_path, "--num-label=5000", status=2)
    assert "no unlabelled images are left of 1297" in tiny.errors(tmp_path)


class TestOwnImages:
    """--dataset PATH: sizes, classes and statistics come from the images, and what does not fit is said first."""

    def folder(self, place: Path, side: int = 8) -> Path:
        rng = np.random.default_rng(0)
        for split, names in (("train", ("bird", "cat", "owl")), ("test", ("cat", "owl"))):
            for name in names:
                (place / split / name).mkdir(parents=True)
                for number in range(6):
                    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(
                        place / split / name / f"{number}.png")
        return place

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_a_source_of_own_images(self, tmp_path: Path) -> None:
        options = parse_meta([f"--dataset={self.folder(tmp_path / 'set')}", "--num-label=6", "-asmall",
                                    "--batch-size=4", "--total-steps=3"])
        assert options.num_classes == 3 and options.method["dataset"] == "own images"
        source = SmallImages(options, World(), unlabeled=True)
        batch = next(source.stream(0, 1))
        assert batch.labeled.shape == (4, 3, 8, 8) and source.classes == ("bird", "cat", "owl")
        assert sorted(set(source.test.labels.tolist())) == [1, 2]  # by name

    @pytest.mark.parametrize(("flags", "message"), [
        (["-aconvlarge"], "12x12 and more"), (["-ashakeshake"], "is for images of 32x32"),
        (["-asmall", "--num-label=2"], "has 3 classes"), (["--dataset=nowhere"], "neither one of cifar10")])
    def test_what_does_not_fit(self, flags: list[str], message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message):
            parse_meta([f"--dataset={self.folder(tmp_path / 'set')}", *flags])
