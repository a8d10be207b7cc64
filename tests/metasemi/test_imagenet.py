"""Training on record files of photographs: interrupted, resumed, with either decoder, evaluated, with bad records."""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from MetaSemi.core.training import Training
from MetaSemi.imagenet.records import RecordFile
from MetaSemi.imagenet.source import CLASSIFIERS, make_classifier
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.metasemi import photographs
from tests.metasemi.events import scalars
from tests.metasemi.photographs import checkpoint, run, train
from tests.shared import programs
from tests.shared.programs import assert_same

NINE = [f"{name}.{ending}" for name in ("train_label", "train_unlabel", "val") for ending in ("idx", "lst", "rec")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs.pack(photographs.make_tree(tmp_path_factory.mktemp("imagenet")))


@pytest.fixture(scope="module")
def data(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record files alone: nothing else is needed to train."""
    folder = tmp_path_factory.mktemp("records")
    for name in NINE:
        if not name.endswith(".lst"):
            shutil.copy(tree / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of both scripts that nothing interrupted."""
    folders = {}
    for name in photographs.SCRIPTS:
        folders[name] = tmp_path_factory.mktemp("whole") / name
        run(name, folders[name], data)
    return folders


class KilledAt:
    """Kills the process in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        step_of = Training.log
        count = iter(range(self.step + 1))

        def log(training, *args, **values):
            if next(count) == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            step_of(training, *args, **values)

        Training.log = log


def test_the_readme_ends_in_nine_files(tree: Path) -> None:
    """The names of the classes lie beside them."""
    names = [f"{name}.synset.txt" for name in ("train_label", "train_unlabel", "val")]
    assert sorted(path.name for path in tree.iterdir() if path.is_file()) == sorted(NINE + names)
    sizes = {name: len(RecordFile(tree / name)) for name in ("train_label", "train_unlabel", "val")}
    assert sizes == {"train_label": 9, "train_unlabel": 15, "val": 15}


@pytest.mark.parametrize("name", photographs.SCRIPTS)
def test_a_run_leaves_what_was_published(name: str, whole: dict[str, Path]) -> None:
    folder = whole[name] / "run"
    content = read_checkpoint(folder / "checkpoint.pth")
    # Three epochs of 15 unlabelled images, or of 9 labelled ones, in batches of 4.
    length = 4 if name == "meta" else 3
    assert content["epoch"] == 3 and content["step"] == 3 * length
    best = read_checkpoint(folder / "model_best.pth")
    assert set(best) >= {"epoch", "state_dict", "best_acc1", "optimizer"} and best["best_acc1"] == content["best_acc1"]
    log = (folder / "log.txt").read_text()
    assert f"Ep[2/3] It[2/{length}] " in log and " * Prec@1 " in log and "Best acc1=" in log
    found = scalars(folder)
    assert [x for x, _ in found["test/acc1"]] == [0, 1, 2]
    assert [x for x, _ in found["train/learning-rate"]] == ([0, 2, 4, 6, 8, 10] if name == "meta" else [0, 2, 3, 5, 6,
                                                                                                      8])
    result = json.loads((folder / "result.json").read_text())
    assert result["accuracy"]["best_on_test"] == pytest.approx(content["best_acc1"] / 100)
    assert result["iterations"] == 3 * length and result["images"]["val"] == 15


@pytest.mark.parametrize("name", photographs.SCRIPTS)
@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_killed_and_resumed_is_bitwise_the_same(name: str, step: int, whole: dict[str, Path], data: Path,
                                                tmp_path: Path) -> None:
    run(name, tmp_path, data, "--save-seconds", "0", sabotage=KilledAt(step), status=-signal.SIGKILL)
    run(name, tmp_path, data)
    assert_same(checkpoint(tmp_path), checkpoint(whole[name]))
    assert_same(checkpoint(tmp_path, "model_best.pth"), checkpoint(whole[name], "model_best.pth"))


def test_a_trial_is_continued(whole: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run("baseline", tmp_path, data, "--iterations", "3")
    run("baseline", tmp_path, data, "--batch-size", "4", "--workers", "2")
    assert_same(checkpoint(tmp_path)["state_dict"], checkpoint(whole["baseline"])["state_dict"])


def test_resume_names_any_checkpoint(whole: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Also one that holds no more than the published ones do: it goes on with the next epoch."""
    content = read_checkpoint(whole["baseline"] / "run" / "checkpoint.pth")
    published = {key: content[key] for key in ("state_dict", "best_acc1", "optimizer")} | {"epoch": 2}
    torch.save(published, tmp_path / "published.pth")
    run("baseline", tmp_path, data, "--resume", str(tmp_path / "published.pth"))
    assert checkpoint(tmp_path)["step"] == 9
    assert "Ep[2/3]" in (tmp_path / "run" / "log.txt").read_text()
    assert "Ep[1/3]" not in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("name", photographs.SCRIPTS)
def test_both_decoders_train_alike(name: str, data: Path, tmp_path: Path) -> None:
    losses = []
    for decoder in ("dali", "torchvision"):
        folder = tmp_path / decoder
        train(name, data, "--decoder", decoder, "--iterations", "1", "--save-path", str(folder), "-a", "resnet18",
              "--imcrop", "64", "--imsize", "64")
        assert f"decoded by {decoder}" in (folder / "log.txt").read_text()
        losses.append(json.loads((folder / "stats.jsonl").read_text().splitlines()[0])["loss"])
    # Inputs differ by a grey level at most; the network makes more of it.
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_evaluate_measures_and_leaves_the_run_alone(whole: dict[str, Path], data: Path,
                                                    capsys: pytest.CaptureFixture) -> None:
    folder = whole["baseline"] / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}
    photographs.call(photographs.SCRIPTS["baseline"], *photographs.TINY, "--data", data, "--save-path", folder,
                     "--evaluate")
    measured = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" * Prec@1")]
    logged = [line for line in (folder / "log.txt").read_text().splitlines() if " * Prec@1" in line]
    assert logged[-2].endswith(measured[0].strip())
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"} == before


@pytest.mark.parametrize("name", ["meta", pytest.param("baseline", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(name: str, data: Path, tmp_path: Path) -> None:
    """Of half the batch each."""
    script = f"MetaSemi/{photographs.SCRIPTS[name].__name__.rpartition('.')[2]}.py"
    # A network and images that do not amplify rounding, as few values a channel in batch norm do.
    args = [*photographs.TINY, "--data", data, "-a", "resnet18", "--imcrop", "64", "--imsize", "64", "--batch-size",
            "8", "--iterations", "2", "--lr", "0.01"]
    programs.run(script, *args, "--save-path", "one/run", cwd=tmp_path)
    if name == "meta":  # as the published command has it, which passes --local-rank
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={port}"]
        subprocess.run([*launcher, programs.ROOT / script, *args, "--batch-size", "4", "--save-path", "two/run"],
                       cwd=tmp_path, env=programs.environment(), check=True, timeout=300)
    else:
        programs.run(script, *args, "--batch-size", "4", "--save-path", "two/run", cwd=tmp_path, ranks=2)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["step"] == two["step"] == 2
    for key, value in one["state_dict"].items():
        np.testing.assert_allclose(two["state_dict"][key], value, rtol=1e-3, atol=5e-4, err_msg=key)
    losses = [json.loads((tmp_path / folder / "run" / "stats.jsonl").read_text().splitlines()[0])["loss"]
              for folder in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("name", "side"), [
    ("googlenet", 32), *(pytest.param(name, {"maxvit_t": 224, "vit_h_14": 56}.get(name, 96),
                                                                  marks=pytest.mark.slow) for name in CLASSIFIERS)])
def test_network_gives_one_vector_of_logits(name: str, side: int) -> None:
    """In train mode too, where some of torchvision's give more."""
    net = make_classifier(name, 7, side)
    assert net.training and net(torch.zeros(2, 3, side, side)).shape == (2, 7)


@pytest.mark.parametrize(("name", "side"), [("alexnet", 32), ("maxvit_t", 64), ("vit_b_32", 80)])
def test_side_that_a_network_does_not_take(name: str, side: int) -> None:
    with pytest.raises(UserError, match=f"^--imcrop {side}: {name} does not take images of this size [(].*[)]$"):
        make_classifier(name, 7, side)


def test_local_rank_in_both_spellings(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for script in photographs.SCRIPTS.values():
        for flags in (["--local_rank", "1"], ["--local-rank=1"]):
            monkeypatch.setenv("LOCAL_RANK", "0")  # so that what the script sets goes with this test
            monkeypatch.delenv("LOCAL_RANK")
            assert script.parse([*flags, "--data", str(data)]).local_rank == 1
            assert os.environ["LOCAL_RANK"] == "1"
    monkeypatch.delenv("LOCAL_RANK")


class TestBadInput:
    def error(self, name: str, data: Path, *extra: str) -> str:
        with pytest.raises(UserError) as caught:
            train(name, data, *extra)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def damaged(self, data: Path, tmp_path: Path, name: str, change) -> Path:
        """Return a copy of the record files in which the bytes of one are changed."""
        folder = tmp_path / "damaged"
        shutil.copytree(data, folder)
        (folder / name).write_bytes(change((data / name).read_bytes()))
        return folder

    def test_missing_files(self, tmp_path: Path) -> None:
        assert "nowhere" in self.error("meta", tmp_path / "nowhere")
        assert "train_label.rec" in self.error("meta", tmp_path)

    def test_unknown_network(self, data: Path) -> None:
        assert 'did you mean "resnet18"' in self.error("meta", data, "-a", "resnet81")
        assert "unknown name" in self.error("meta", data, "-a", "__import__('os')")

    def test_label_beyond_the_classes(self, data: Path) -> None:
        message = self.error("baseline", data, "--num-classes", "2")
        assert "train_label.rec: record" in message and "label 2" in message

    @pytest.mark.parametrize("decoder", ["dali", "torchvision"])
    def test_cut_short(self, decoder: str, data: Path, tmp_path: Path) -> None:
        folder = self.damaged(data, tmp_path, "train_label.rec", lambda content: content[:-10])
        message = self.error("baseline", folder, "--decoder", decoder)
        assert "train_label.rec: record 8 (id" in message and "cut short" in message
        assert not Path("run").exists()
        with pytest.warns(UserWarning, match="1 bad records are left out, the first: .*record 8 "):
            train("baseline", folder, "--skip-bad", "--iterations", "1", "--decoder", decoder)

    def test_index_of_another_file(self, data: Path, tmp_path: Path) -> None:
        other = (data / "train_unlabel.idx").read_bytes()
        folder = self.damaged(data, tmp_path, "train_label.idx", lambda content: other)
        message = self.error("baseline", folder)
        assert "train_label.rec: record 0 (id" in message and "index does not match" in message

    @pytest.mark.parametrize("decoder", ["dali", "torchvision"])
    def test_image_that_does_not_decode(self, decoder: str, data: Path, tmp_path: Path) -> None:
        def spoil(content: bytes) -> bytes:
            end = content.index(b"\xff\xd9")  # of the first image
            return content[:end - 200] + bytes(202) + content[end + 2:]

        folder = self.damaged(data, tmp_path, "train_label.rec", spoil)
        message = self.error("baseline", folder, "--decoder", decoder)
        assert "train_label.rec: record 0 (id" in message and "cut short or not an image" in message
        train("baseline", folder, "--decoder", decoder, "--skip-bad", "--save-path", "skipped", "--epochs", "2")
        assert json.loads(Path("skipped/result.json").read_text())["bad_records"]["train_label"] == 1
        assert "bad records left out: 1 in train_label" in Path("skipped/log.txt").read_text()

    def test_bad_validation_image_is_not_counted(self, data: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
        """Neither is what stands in for it in the batch: the accuracy is a multiple of 1/14."""
        def spoil(content: bytes) -> bytes:
            end = content.index(b"\xff\xd9")
            return content[:end - 200] + bytes(202) + content[end + 2:]

        folder = self.damaged(data, tmp_path, "val.rec", spoil)
        train("baseline", folder, "--skip-bad", "--epochs", "1", "--warmup", "0", "--iterations", "1")
        share = 14 * json.loads(Path("run/result.json").read_text())["accuracy"]["last"]
        assert share == pytest.approx(round(share), abs=1e-5)

    def test_checkpoint_of_another_network(self, data: Path, tmp_path: Path, whole: dict[str, Path]) -> None:
        path = whole["baseline"] / "run" / "checkpoint.pth"
        message = self.error("baseline", data, "-a", "resnet18", "--resume", str(path))
        assert str(path) in message and "state_dict does not fit" in message
        torch.save({"other": 1}, tmp_path / "other.pth")
        assert "holds no state_dict" in self.error("baseline", data, "--resume", str(tmp_path / "other.pth"))
        assert "no file" in self.error("baseline", data, "--resume", "missing.pth")

    def test_other_settings_in_the_same_folder(self, data: Path, whole: dict[str, Path]) -> None:
        message = self.error("baseline", data, "--save-path", str(whole["baseline"] / "run"), "--lr", "0.5")
        assert "lr was 0.05, is 0.5" in message
