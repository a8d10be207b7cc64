"""Two processes with half a batch each are one process with the whole batch."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shared.distributed import World
from shared.training.randomness import Dropout
from tests.shared.programs import run
from tests.torchssl.tiny import TINY, checkpoint
from TorchSSL import freematch
from TorchSSL.core import options
from TorchSSL.core.algorithm import Batch, Setting
from TorchSSL.core.data import Batches, load_training_data
from TorchSSL.core.networks import WideResNet
from TorchSSL.core.trainer import Trainer

FLAGS = [*TINY, "--num_train_iter=6", "--num_eval_iter=3", "--ent_loss_ratio=0.1", "--lr=0.01"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for ranks in (1, 2):
        folders.append(tmp_path_factory.mktemp(f"ranks{ranks}"))
        run("TorchSSL/freematch.py", *FLAGS, cwd=folders[-1], ranks=ranks)
    return folders


def test_weights_thresholds_and_averages_agree(runs: list[Path]) -> None:
    one, two = map(checkpoint, runs)
    assert two["step"] == 6
    for name in ("time_p", "p_model", "label_hist"):
        torch.testing.assert_close(two["algorithm"][name], one["algorithm"][name], rtol=0, atol=1e-6)
    for part in ("model", "ema_model"):
        assert list(two[part]) == list(one[part])  # no `module.` in front
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_losses_and_metrics_agree(runs: list[Path]) -> None:
    def lines(folder: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (folder / "saved_models/tiny/stats.jsonl").read_text().splitlines()]

    one, two = map(lines, runs)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    averaged = [(a, b) for a, b in zip(one, two, strict=True) if "eval/loss" not in a]
    assert averaged
    for a, b in averaged:
        for name in ("train/sup_loss", "train/unsup_loss", "train/ent_loss", "train/mask_ratio", "train/time_p"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    for a, b in zip(one, two, strict=True):
        if "eval/loss" in a:
            assert b["eval/loss"] == pytest.approx(a["eval/loss"], rel=1e-4)
            assert b["eval/AUC"] == pytest.approx(a["eval/AUC"], abs=1e-4)


def test_ranks_share_one_batch_in_order(tmp_path: Path) -> None:
    """The parts of three ranks, put together, are the batch of one; another seed or step gives another."""
    settings = freematch.parse([*TINY, "--batch_size=6"])
    data = load_training_data(settings, tmp_path)
    views = ("weak", "strong")
    whole = Batches(data, settings, World(), views, 6)(5)
    parts = [Batches(data, settings, World(rank, 3), views, 6)(5) for rank in range(3)]
    for name in ("labeled", "labels", "index", "truth"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    for view in range(2):
        assert torch.equal(torch.cat([part.views[view] for part in parts]), whole.views[view])
    assert torch.equal(whole.truth, torch.from_numpy(data.unlabeled.labels)[whole.index])
    assert not torch.equal(whole.views[0], whole.views[1])
    again = Batches(data, settings, World(), views, 6)
    assert torch.equal(again(5).labeled, whole.labeled) and not torch.equal(again(6).index, whole.index)
    settings.seed = 2
    assert not torch.equal(Batches(data, settings, World(), views, 6)(5).index, whole.index)


def test_dropout_follows_the_step_and_the_forward_pass() -> None:
    """Each pass of a step has masks of its own, which are the same after a restart and on any number of ranks."""
    settings = freematch.parse([*TINY, "--dropout=0.5"])

    def keys(world: World, sizes: tuple[int, ...], passes: int) -> list[torch.Tensor]:
        net = WideResNet(10, depth=10, widen_factor=1, dropout=0.5)
        learner = freematch.FreeMatch(settings, Setting(10, 100, (0.1,) * 10, world))
        trainer = Trainer(net, learner, settings, World())
        trainer.world = world
        parts = [torch.zeros(size, 3, 8, 8) for size in sizes]
        trainer.begin(7, Batch(parts[0], torch.zeros(sizes[0]), tuple(parts[1:])))
        layers = [layer for layer in net.modules() if isinstance(layer, Dropout)]
        found = []
        for _ in range(passes):
            net(torch.cat(parts))
            found.append(torch.stack([layer.keys for layer in layers]))
        return found

    first, second = keys(World(), (4, 8), passes=2)
    assert not torch.equal(first, second) and torch.equal(first, keys(World(), (4, 8), passes=1)[0])
    zero, one = (keys(World(rank, 2), (2, 4), passes=1)[0].split([2, 4], dim=2) for rank in range(2))
    assert torch.equal(torch.cat([zero[0], one[0], zero[1], one[1]], 2), first)


def test_batch_that_ranks_cannot_share(tmp_path: Path) -> None:
    result = run("TorchSSL/freematch.py", *TINY, "--batch_size=5", cwd=tmp_path, ranks=2, status=1)
    assert "--batch_size 5 cannot be shared evenly by 2 processes" in result.stderr
    assert "Traceback (most recent call last):\n  File \"TorchSSL" not in result.stderr
    assert not (tmp_path / "saved_models").exists()


def test_more_gpus_than_one_start_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(options.os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(options.sys, "argv", ["freematch.py", "--batch_size=8"])
    monkeypatch.delenv("RANK", raising=False)
    settings = freematch.parse(["--batch_size=8"])
    options.relaunch(settings, gpus=1)
    assert started == []
    options.relaunch(settings, gpus=4)
    assert started[0][1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "freematch.py",
                              "--batch_size=8"]
    for flags in (["--gpu=1"], ["--multiprocessing-distributed=False"], ["--device=cpu"]):
        options.relaunch(freematch.parse(flags), gpus=4)
    assert len(started) == 1
    monkeypatch.setenv("RANK", "0")
    options.relaunch(settings, gpus=4)
    assert len(started) == 1
