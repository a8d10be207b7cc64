"""Stateless randomness, the average of weights, complete-or-absent files, and the world of ranks."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from shared.cli import UserError
from shared.distributed import World, start
from shared.training.ema import EMA, half_life_beta
from shared.training.files import atomic, make_dir, sweep
from shared.training.randomness import numpy_rng, torch_rng
from tests.shared.programs import environment, wait_until


def test_draws_depend_on_seed_step_and_purpose_only():
    keys = [(0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b"), (1, 1, "a"), (0, 11, "a"), (0, 1, "1a")]
    draws = [numpy_rng(*key).integers(1 << 62) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [numpy_rng(*key).integers(1 << 62) for key in keys]
    first, second = (torch.randn(4, generator=torch_rng(3, 4, "x")) for _ in range(2))
    assert torch.equal(first, second)


def test_neighbouring_steps_are_uncorrelated():
    first = np.stack([numpy_rng(0, step, "weak").random(64) for step in range(2000)])
    assert abs(first.mean() - 0.5) < 0.003
    correlation = np.corrcoef(first[:-1].ravel(), first[1:].ravel())[0, 1]
    assert abs(correlation) < 0.01


def test_draws_are_the_same_on_every_machine():
    # Philox of a fixed key: were this to change, old runs could not be continued.
    np.testing.assert_array_equal(numpy_rng(1, 2, "batch").integers(0, 1000, 4), [309, 380, 868, 330])


def test_ema_agrees_with_float64_over_1000_steps():
    torch.manual_seed(0)
    net = torch.nn.Linear(7, 5)
    ema, reference, nimg = EMA(net), [p.detach().double().clone() for p in net.parameters()], 0
    for _ in range(1000):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.01 * torch.randn(p.shape))
        beta = half_life_beta(512, 20_000, nimg, 0.05)
        ema.update(net, beta)
        exact = (p.detach().double() for p in net.parameters())
        reference = [beta * r + (1 - beta) * p for r, p in zip(reference, exact, strict=True)]
        nimg += 512
    for mine, exact in zip(ema.module.parameters(), reference, strict=True):
        assert ((mine - exact).abs() / exact.abs().clamp_min(1e-2)).max() < 1e-6


def test_ema_starts_as_a_copy_and_keeps_buffers_current():
    net = torch.nn.BatchNorm1d(3)
    ema = EMA(net)
    with torch.no_grad():
        net.weight.fill_(5)
    net(torch.randn(9, 3))
    ema.update(net, half_life_beta(64, 500_000, 0, 0.05))
    assert torch.equal(ema.module.weight, net.weight) and torch.equal(ema.module.running_mean, net.running_mean)
    assert int(ema.module.num_batches_tracked) == 1 and not ema.module.training


def test_atomic_file_is_complete_or_absent(tmp_path):
    path = tmp_path / "labels.npy"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with atomic(path, previous=tmp_path / "before") as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and (tmp_path / "before").read_bytes() == b"old"


def test_make_dir_names_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/below"):
        make_dir(tmp_path / "file" / "below")


def test_ranks_share_a_batch_evenly_or_not_at_all():
    parts = [World(rank, 4).slice(64) for rank in range(4)]
    assert [i for part in parts for i in range(64)[part]] == list(range(64))
    with pytest.raises(UserError, match="batch of 63 cannot be shared evenly by 4"):
        World(0, 4).slice(63)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"4 GPU\(s\) were asked for on this machine, but it has 1"):
        start()
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        start("gpu")


WRITER = """
import sys, time
from pathlib import Path
from shared.data.writers import whole_folder
from shared.training.files import atomic
place = Path(sys.argv[1])
with atomic(place / "a.png") as file, atomic(place / "deep" / "b.json", "w"), whole_folder(place / "set"):
    file.write(bytes(1000))
    file.flush()
    (place / "ready").touch()
    while not (place / "go").exists():
        time.sleep(0.01)
"""


def started_writer(place):
    (place / "deep").mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(place)], env=environment())
    wait_until((place / "ready").exists, process)
    (place / "ready").unlink()
    return process


def test_what_killed_writers_left_is_swept_and_what_living_ones_hold_is_not(tmp_path):
    dead = started_writer(tmp_path)
    dead.kill()
    dead.wait()
    living = started_writer(tmp_path)
    others = tmp_path / ".notes.tmp"  # not of the form of our names
    others.touch()
    assert len(list(tmp_path.rglob(".*"))) == 6  # the living one has swept the folder of the dead one
    sweep(tmp_path, "a.png")
    assert len(list(tmp_path.rglob(".a.png.*"))) == 1 and len(list(tmp_path.rglob(".*"))) == 5
    sweep(tmp_path, below=True)
    assert len(list(tmp_path.rglob(".*"))) == 4
    (tmp_path / "go").touch()
    assert living.wait(60) == 0
    assert (tmp_path / "a.png").read_bytes() == bytes(1000) and (tmp_path / "set").is_dir()
    assert list(tmp_path.rglob(".*")) == [others]
