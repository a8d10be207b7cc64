"""A run continues exactly where it was, whatever ended it, and stops where it must."""
import json
import random
import signal
import time

import pytest
import torch

from shared.checkpoint import load_newest, previous_path, read_checkpoint, write_checkpoint
from shared.cli import UserError
from tests.shared.programs import assert_same, one_line_error, run, start

PROGRAM = "tests/shared/tiny_run.py"


def final(folder):
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(PROGRAM, folder)
    return folder


def kill_when(process, folder, steps, number=signal.SIGKILL):
    """Send a signal once the program has done so many steps."""
    order, deadline = folder / "order.jsonl", time.monotonic() + 60
    while not order.exists() or order.read_text().count("\n") < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=60)


def test_killed_twice_and_continued_is_bitwise_equal(whole, tmp_path):
    for steps in (9, 30):
        kill_when(start(PROGRAM, tmp_path, "--pause", "0.05"), tmp_path, steps)
    result = run(PROGRAM, tmp_path)
    assert "continuing at step" in result.stdout
    assert_same(final(whole), final(tmp_path))
    losses = [[json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
              for folder in (whole, tmp_path)]
    assert [(x["step"], x["loss"]) for x in losses[0]] == [(x["step"], x["loss"]) for x in losses[1]]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signal_saves_first(whole, tmp_path, number, status):
    process = start(PROGRAM, tmp_path, "--pause", "0.05", "--save-every", "1000")
    kill_when(process, tmp_path, 10, number)
    assert process.returncode == status
    done = read_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert done == len((tmp_path / "order.jsonl").read_text().splitlines()) >= 10
    run(PROGRAM, tmp_path)
    assert_same(final(whole), final(tmp_path))


def test_two_ranks_equal_one(whole, tmp_path):
    run(PROGRAM, tmp_path, ranks=2)
    one, two = final(whole), final(tmp_path)
    for key, value in one["net"].items():
        torch.testing.assert_close(two["net"][key], value, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "order.jsonl").read_text() == (whole / "order.jsonl").read_text()


def test_ranks_may_change_between_restarts(whole, tmp_path):
    run(PROGRAM, tmp_path, "--steps", "14", ranks=2)
    assert "finished after step 14" in run(PROGRAM, tmp_path, "--steps", "14").stdout
    run(PROGRAM, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 40
    for key, value in final(whole)["net"].items():
        torch.testing.assert_close(final(tmp_path)["net"][key], value, rtol=1e-5, atol=1e-6)


def test_a_signal_to_one_rank_stops_both(tmp_path):
    # torchrun passes the signal on to all; each may be at another point of the same step.
    process = start(PROGRAM, tmp_path, "--pause", "0.1", ranks=2)
    kill_when(process, tmp_path, 5, signal.SIGTERM)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] >= 5


def test_nan_stops_at_its_step_and_saves_nothing_of_it(tmp_path):
    result = run(PROGRAM, tmp_path, "--nan-at", "17", status=1)
    assert "loss is not finite at step 17 on rank 0" in one_line_error(result)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 14


def test_other_settings_are_refused_and_restart_starts_anew(whole, tmp_path):
    run(PROGRAM, tmp_path, "--lr", "0.2", "--steps", "8")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert "lr was 0.2, is 0.1" in one_line_error(run(PROGRAM, tmp_path, status=2))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    run(PROGRAM, tmp_path, "--restart")
    assert_same(final(whole), final(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot create the folder" in one_line_error(run(PROGRAM, tmp_path / "file" / "out", status=2))


def test_damaged_checkpoint_is_found_and_the_previous_one_used(tmp_path):
    path = tmp_path / "checkpoint.pt"
    content = {"net": {"weight": torch.arange(1000.0)}, "step": 1}
    write_checkpoint(path, content)
    write_checkpoint(path, {**content, "step": 2})
    good, chance = path.read_bytes(), random.Random(0)
    for case in range(200):
        bad = bytearray(good)
        if case % 2:
            bad = bad[:chance.randrange(len(bad))]
        else:
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        with pytest.warns(UserWarning) if is_damaged(path) else nothing():
            found, loaded = load_newest(path)
        # Either the damage was in a byte that carries nothing, or the previous file was taken.
        assert loaded["step"] == (2 if found == path else 1)
        assert_same(loaded["net"], content["net"])


def is_damaged(path):
    try:
        read_checkpoint(path)
    except UserError:
        return True
    return False


class nothing:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_killed_between_the_two_renames_leaves_the_previous_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"step": 5})
    path.rename(previous_path(path))
    assert load_newest(path)[1]["step"] == 5


def test_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    import os

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    path = tmp_path / "checkpoint.pt"
    torch.save({"net": Hostile()}, path)
    with pytest.raises(UserError, match="refused"):
        read_checkpoint(path)
    assert not (tmp_path / "was-run").exists()


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"step": 1})
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        write_checkpoint(path, {"step": 2})
    assert read_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def full_disk(content, file):
    file.write(b"half a file")
    raise OSError(28, "No space left on device")
