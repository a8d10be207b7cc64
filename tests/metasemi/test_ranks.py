"""Two processes with half a batch each are one process with the whole batch."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from MetaSemi.core.data import Batches, streams
from MetaSemi.core.training import mixing
from shared.data.datasets import load_dataset
from shared.distributed import World
from shared.training.checkpoint import read_checkpoint
from tests.metasemi.tiny import TINY
from tests.shared.programs import run

FLAGS = [*TINY, "--total-steps=5", "--test-freq=5", "--mix-up", "--save-path=run"]


def trained(folder: Path, ranks: int, *extra: str) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    run("MetaSemi/train_meta.py", *FLAGS, *extra, cwd=folder, ranks=ranks)
    return read_checkpoint(folder / "run" / "checkpoint.pth")["model"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    places = [tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)]
    for ranks, folder in enumerate(places, start=1):
        trained(folder, ranks)
    return places


def test_weights_agree(folders: list[Path]) -> None:
    one, two = (read_checkpoint(folder / "run" / "checkpoint.pth") for folder in folders)
    assert list(one["model"]) == list(two["model"])  # no `module.` in front
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5)
    assert two["step"] == 5 and two["best_acc"] == pytest.approx(one["best_acc"], abs=0.41)


def test_scalars_agree(folders: list[Path]) -> None:
    one, two = (json.loads((folder / "run" / "stats.jsonl").read_text()) for folder in folders)
    assert list(one) == list(two)
    for name in ("train/label-loss", "train/unlabel-loss", "train/interp-loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert two["train/label-acc"] == pytest.approx(one["train/label-acc"], abs=1e-3)


def test_local_meta_gradient_is_another_method(folders: list[Path], tmp_path: Path) -> None:
    """With --local-meta each rank has its own gradient, as in the original: close, but not the same."""
    ours = read_checkpoint(folders[1] / "run" / "checkpoint.pth")["model"]
    local = trained(tmp_path / "local", 2, "--local-meta")
    apart = max((local[name].double() - value.double()).abs().max().item() for name, value in ours.items())
    assert 2e-5 < apart < 0.1


def test_ranks_share_one_batch_in_order() -> None:
    images = load_dataset("digits", "train")
    import random

    def batch(world: World):
        pools = streams(range(20), range(20, 300), 600, random.Random(0))
        batches = Batches(images, pools, "digits", 6, 1, world)
        return batches(5), mixing(1, 5, 0.5, 6, world)

    whole, lam = batch(World())
    parts = [batch(World(rank, 3)) for rank in range(3)]
    for name in ("labeled", "labels", "unlabeled", "truth"):
        assert torch.equal(torch.cat([getattr(part, name) for part, _ in parts]), getattr(whole, name)), name
    assert torch.equal(torch.cat([share for _, share in parts]), lam)
    assert lam.shape == (6, 1) and 0 <= lam.min() and lam.max() <= 1


def test_batch_that_ranks_cannot_share(tmp_path: Path) -> None:
    result = run("MetaSemi/train_meta.py", *FLAGS, "--batch-size=5", cwd=tmp_path, ranks=2, status=1)
    assert "--batch-size 5 cannot be shared evenly by 2 processes" in result.stderr
    assert not (tmp_path / "run").exists()
