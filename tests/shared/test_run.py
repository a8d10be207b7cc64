"""A run continues exactly where it was, whatever ended it, and stops where it must."""
import json
import random
import signal

import pytest
import torch

from shared import distributed
from shared.cli import Diverged, UserError
from shared.distributed import _checksum
from shared.training import files
from shared.training.checkpoint import load_newest, previous_path, read_checkpoint, write_checkpoint
from shared.training.files import atomic
from tests.shared.programs import assert_same, one_line_error, run, start, wait_until

PROGRAM, MISHAP = "tests/shared/tiny_run.py", "tests/shared/mishap.py"


def final(folder):
    return torch.load(folder / "final.pt", weights_only=True)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(PROGRAM, folder)
    return folder


def kill_when(process, folder, steps, number=signal.SIGKILL, wait=True):
    """Send a signal once the program has done so many steps; return what it said if it ends of that."""
    order = folder / "order.jsonl"
    wait_until(lambda: order.exists() and order.read_text().count("\n") >= steps, process)
    process.send_signal(number)
    return process.communicate(timeout=60) if wait else None


def test_killed_twice_and_continued_is_bitwise_equal(whole, tmp_path):
    for steps in (9, 30):
        kill_when(start(PROGRAM, tmp_path, "--pause", "0.05"), tmp_path, steps)
    result = run(PROGRAM, tmp_path)
    assert "continuing at step" in result.stdout
    assert_same(final(whole), final(tmp_path))
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signal_saves_first(whole, tmp_path, number, status):
    process = start(PROGRAM, tmp_path, "--pause", "0.05", "--save-every", "1000")
    kill_when(process, tmp_path, 10, number)
    assert process.returncode == status
    done = read_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert done == len((tmp_path / "order.jsonl").read_text().splitlines()) >= 10
    run(PROGRAM, tmp_path)
    assert_same(final(whole), final(tmp_path))


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(PROGRAM, folder, ranks=2)
    return folder


def assert_close(ours, theirs):
    for key, value in final(theirs)["net"].items():
        torch.testing.assert_close(final(ours)["net"][key], value, rtol=1e-5, atol=1e-6)
    assert (ours / "order.jsonl").read_text() == (theirs / "order.jsonl").read_text()


def test_two_ranks_equal_one(whole, whole_of_two):
    assert_close(whole_of_two, whole)


def test_ranks_may_change_between_restarts(whole, tmp_path):
    """One rank, two, one again, each ended by a signal, which reaches every rank in another part of a step."""
    for ranks, steps in (1, 12), (2, 26):
        kill_when(start(PROGRAM, tmp_path, "--pause", "0.1", ranks=ranks), tmp_path, steps, signal.SIGTERM)
        assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] >= steps
    run(PROGRAM, tmp_path)
    assert_close(tmp_path, whole)
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_a_rank_that_dies_is_started_again_by_torchrun(whole_of_two, tmp_path):
    """All ranks go on from the last checkpoint, without a hang, to the bits of two ranks that nobody disturbed."""
    run(MISHAP, "kill", "20", PROGRAM, tmp_path, ranks=2, restarts=1)
    assert (tmp_path / "died").exists()
    assert "continuing at step 14" in (tmp_path / "log.txt").read_text()
    assert_same(final(tmp_path), final(whole_of_two))
    assert losses(tmp_path) == pytest.approx(losses(whole_of_two), rel=1e-6)


def test_ranks_that_drift_apart_are_found_at_the_next_checkpoint(tmp_path):
    failed = run(MISHAP, "drift", "16", PROGRAM, tmp_path, ranks=2, status=1)
    assert "error: net.0.weight differs between ranks 0 and 1 after step 21; nothing was saved" in failed.stderr
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
def test_every_changed_element_and_every_exchange_is_a_drift(dtype, monkeypatch):
    ours = torch.arange(1, 49).reshape(2, 4, 6).remainder(5).to(dtype)
    others = [ours.clone() for _ in range(49)]
    for place, other in enumerate(others[:48]):
        other.view(-1)[place] = not other.view(-1)[place] if dtype == torch.bool else -1 - place
    others[48][0, 0, 3:5] = ours[0, 0, 3:5].flip(0)
    for other in others:
        theirs = torch.stack([_checksum(ours), _checksum(other)])[None]
        monkeypatch.setattr(distributed, "gather", lambda sums, _, theirs=theirs: torch.cat([sums, theirs]))
        with pytest.raises(Diverged, match="^b differs between ranks 0 and 1 now"):
            distributed.check_equal({"a": ours, "b": ours}, distributed.World(0, 2), "now")


def test_nan_stops_at_its_step_and_saves_nothing_of_it(tmp_path):
    line = one_line_error(run(MISHAP, "nan", "17", PROGRAM, tmp_path, status=1))
    assert "loss is not finite at step 17 on rank 0; the first non-finite tensor is net.0.weight" in line
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 14


def test_other_settings_are_refused(tmp_path):
    run(PROGRAM, tmp_path, "--lr", "0.2", "--steps", "8")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert "lr was 0.2, is 0.1" in one_line_error(run(PROGRAM, tmp_path, status=2))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_overwrite_moves_another_run_aside_and_nothing_else(whole, whole_of_two, tmp_path):
    folder = tmp_path / "run"
    run(PROGRAM, folder, "--lr", "0.2", "--steps", "8")
    former = (folder / "checkpoint.pt").read_bytes()
    assert "or --overwrite to move it aside" in one_line_error(run(PROGRAM, folder, "--overwrite=no", status=2))
    said = run(PROGRAM, folder, "--overwrite").stdout
    aside = tmp_path / "run.replaced-1"
    assert f"{folder} held a run with other settings (lr was 0.2, is 0.1): moved to {aside}\n" in said
    assert_same(final(whole), final(folder))
    assert (aside / "checkpoint.pt").read_bytes() == former
    assert f"complete: {folder}" in run(PROGRAM, folder, "--overwrite").stdout
    run(PROGRAM, aside, "--overwrite", ranks=2)
    assert_close(aside, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.replaced-1", "run.replaced-1.replaced-1"]


def test_a_finished_run_says_so(whole):
    before = (whole / "checkpoint.pt").read_bytes()
    assert run(PROGRAM, whole).stdout == f"complete: {whole}\n"
    assert (whole / "checkpoint.pt").read_bytes() == before


def test_another_input_is_named(tmp_path):
    file, folder = tmp_path / "input", tmp_path / "run"
    file.write_text("1")
    run(PROGRAM, folder, "--input", file, "--steps", "8")
    file.rename(tmp_path / "moved")
    assert "complete" in run(PROGRAM, folder, "--input", tmp_path / "moved", "--steps", "8").stdout
    file.write_text("2")
    before = (folder / "checkpoint.pt").read_bytes()
    line = one_line_error(run(PROGRAM, folder, "--input", file, status=2))
    assert "another content of --input" in line
    assert "another content of --input" in one_line_error(run(PROGRAM, folder, status=2))
    assert (folder / "checkpoint.pt").read_bytes() == before
    run(PROGRAM, folder, "--input", file, "--steps", "8", "--overwrite")
    assert "complete" in run(PROGRAM, folder, "--input", file, "--steps", "8").stdout


def test_a_checkpoint_without_fingerprints_is_continued_once(whole, tmp_path):
    """What versions before fingerprints wrote, here of a run that is under way and of a finished one."""
    file, folder = tmp_path / "input", tmp_path / "run"
    file.write_text("1")
    run(PROGRAM, folder, "--steps", "8")
    for steps in ("40", "40"):
        content = read_checkpoint(folder / "checkpoint.pt")
        del content["inputs"]
        torch.save(content, folder / "checkpoint.pt")
        said = run(PROGRAM, folder, "--input", file, "--steps", steps).stdout
        assert said.count("holds no fingerprints of --input") == 1
        assert read_checkpoint(folder / "checkpoint.pt")["inputs"].keys() == {"--input"}
        assert run(PROGRAM, folder, "--input", file, "--steps", steps).stdout == f"complete: {folder}\n"
    assert_same(final(whole), final(folder))


def test_an_input_that_is_absent_leaves_no_folder(tmp_path):
    failed = run(PROGRAM, tmp_path / "run", "--input", tmp_path / "absent", status=2)
    assert f"--input: cannot read {tmp_path}/absent" in one_line_error(failed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_start_leaves_the_first_alone(tmp_path, ranks):
    first = start(PROGRAM, tmp_path, "--pause", "0.1", "--steps", "100000")
    try:
        kill_when(first, tmp_path, 8, signal.SIGCONT, wait=False)
        (tmp_path / ".checkpoint.pt.1.tmp").write_text("being written")
        failed = run(PROGRAM, tmp_path, ranks=ranks, status=2 if ranks == 1 else 1)
        assert failed.stderr.count("is in use by a run that is still going on") == 1
        assert (tmp_path / ".checkpoint.pt.1.tmp").exists() and first.poll() is None
    finally:
        first.kill()
        first.communicate()
    run(PROGRAM, tmp_path, "--steps", "8")
    assert not (tmp_path / ".checkpoint.pt.1.tmp").exists()


def test_of_two_starts_at_once_one_wins(whole, tmp_path):
    processes = [start(PROGRAM, tmp_path, "--pause", "0.05") for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) in ([0, 2], [0, 0])  # [0, 0]: one after the other
    for process, errors in zip(processes, said, strict=True):
        assert (process.returncode == 2) == ("is in use by a run" in errors)
    assert_same(final(tmp_path), final(whole))


def test_a_weight_that_is_not_finite_is_never_saved_as_finished(tmp_path):
    line = one_line_error(run(MISHAP, "nan", "40", PROGRAM, tmp_path, status=1))
    assert "a weight is not finite at step 39 on rank 0; the first non-finite tensor is net.0.weight" in line
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["step"] == 35 and not saved["finished"] and not (tmp_path / "final.pt").exists()


def test_a_file_that_grows_too_large_in_a_save(tmp_path):
    run(PROGRAM, tmp_path, "--steps", "8")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    failed = run(PROGRAM, tmp_path, before=["prlimit", "--fsize=6000"], status=2)
    assert f"File too large: {tmp_path}/checkpoint.pt; the last checkpoint is whole" in one_line_error(failed)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not list(tmp_path.glob(".*.tmp"))
    run(PROGRAM, tmp_path)


@pytest.mark.parametrize("name", ["log.txt", "stats.jsonl"])
def test_a_log_that_cannot_be_written(tmp_path, name):
    (tmp_path / name).mkdir()
    assert f"cannot write {tmp_path}/{name}: Is a directory" in one_line_error(run(PROGRAM, tmp_path, status=2))


@pytest.mark.parametrize("place", ["folder", "absent/name", "file/name", "x" * 300])
def test_a_path_that_no_file_can_have(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*; choose another place"), atomic(tmp_path / place) as file:
        file.write(b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


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


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(whole, tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(PROGRAM, tmp_path, "--steps", "21")  # saves 7, 14, 21
    former = previous_path(path).read_bytes()
    path.write_bytes(b"damaged")
    kill_when(start(PROGRAM, tmp_path, "--pause", "0.05"), tmp_path, 24 + 8)
    assert read_checkpoint(path)["step"] > 14 and previous_path(path).read_bytes() == former
    path.write_bytes(b"damaged again")
    assert "continuing at step 14" in run(PROGRAM, tmp_path).stdout
    assert_same(final(whole), final(tmp_path))


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
    monkeypatch.setattr(files, "open", lambda path, mode, **_: path.touch() or open("/dev/full", mode), raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(path, {"step": 2, "net": torch.zeros(10_000)})
    assert read_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
