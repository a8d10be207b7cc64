"""train.py: interruptions, accumulation, transfer and resume, folders, mistakes."""
import copy
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from EDM.train import main
from EDM.training.config import RESULT_FILE, batch_rounds, read_options
from EDM.training.snapshots import load_network, load_training_state
from EDM.training.training_loop import learning_rate, replace_non_finite
from shared.cli import Diverged, UserError
from shared.data.images import read_images
from shared.data.writers import write_npz
from shared.training.checkpoint import keep_layout
from tests.edm.training_runs import TINY, checkpoint, largest_difference, losses, outcome, stats, write_set
from tests.golden.cases import arrays
from tests.shared.programs import assert_same, one_line_error, run, start


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data") / "tiny.zip")


@pytest.fixture(autouse=True, scope="module")
def same_arithmetic(tmp_path_factory):
    """One thread here as in the programs that are started, since sums depend on it in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWLABEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def train(outdir: Path, data: Path, *more: str) -> Path:
    """Train in this process and return the run's folder."""
    main([f"--outdir={outdir}", f"--data={data}", *TINY, *more])
    return Path(outdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run that nothing interrupts."""
    return train(tmp_path_factory.mktemp("runs") / "whole", data, "--nosubdir")


# ------------------------------------------------------------------------------------------------- interruptions

def test_killed_at_any_moment_gives_the_same_bits(tmp_path, data, whole, capsys):
    folder = tmp_path / "run"
    arguments = [f"--outdir={folder}", f"--data={data}", *TINY, "--nosubdir"]
    for moment in ("options", "1", "20", "state"):  # before the first step, after the first tick, midway, at the end
        seconds = "--checkpoint-seconds=1e-6" if moment == "20" else "--checkpoint-seconds=600"
        run("tests/edm/interrupted.py", "SIGKILL", moment, "EDM/train.py", *arguments, seconds, status=-signal.SIGKILL)
        assert not (folder / RESULT_FILE).exists()
    assert (folder / "network-snapshot-000001.pkl").exists()
    main(arguments)
    assert_same(outcome(folder), outcome(whole))
    assert "Continuing the run in" in capsys.readouterr().out
    main(arguments)
    assert f"complete: {folder}" in capsys.readouterr().out


def test_sigterm_saves_the_step_at_hand(tmp_path, data, whole):
    folder = tmp_path / "run"
    arguments = [f"--outdir={folder}", f"--data={data}", *TINY, "--nosubdir"]
    run("tests/edm/interrupted.py", "SIGTERM", "7", "EDM/train.py", *arguments, status=143)
    assert checkpoint(folder)["step"] == 7
    main(arguments)
    assert_same(outcome(folder), outcome(whole))


def test_two_processes_train_the_same_network(tmp_path, data, whole):
    command = ["EDM/train.py", f"--outdir={tmp_path}", f"--data={data}", *TINY]
    both = tmp_path / "00000-tiny-cond-ddpmpp-edm-gpus2-batch16-fp32"
    run(*command, ranks=2)
    assert [entry["num"] for entry in losses(both)] == [entry["num"] for entry in losses(whole)]
    for ours, theirs in zip(losses(both), losses(whole), strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"], rel=1e-4)
    for name in ("net", "ema"):
        assert largest_difference(checkpoint(both)[name], checkpoint(whole)[name]) < 1e-4


@pytest.mark.slow  # tests/shared/test_run.py asks the same of the part of a run that all trainers share
def test_a_run_continues_with_another_number_of_processes(tmp_path, data, whole):
    arguments = [f"--outdir={tmp_path}", f"--data={data}", *TINY]
    folder = tmp_path / "00000-tiny-cond-ddpmpp-edm-gpus2-batch16-fp32"
    process = start("tests/edm/interrupted.py", "SIGTERM", "7", "EDM/train.py", *arguments, ranks=2)
    process.communicate()
    assert checkpoint(folder)["step"] == 7
    main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    assert checkpoint(folder)["finished"]
    assert largest_difference(checkpoint(folder)["net"], checkpoint(whole)["net"]) < 1e-4


# ----------------------------------------------------------------------------------- accumulation, transfer, resume

def test_accumulation_changes_nothing(tmp_path, data, whole):
    parts = train(tmp_path / "parts", data, "--nosubdir", "--batch-gpu=4")
    for ours, theirs in zip(losses(parts), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert largest_difference(checkpoint(parts)["net"], checkpoint(whole)["net"]) < 1e-4


def test_resume_from_a_training_state_is_exact(tmp_path, data):
    long = train(tmp_path / "long", data, "--nosubdir", "--duration=0.002")
    resumed = train(tmp_path / "resumed", data, "--nosubdir", "--duration=0.002",
                    f"--resume={long / 'training-state-000001.pt'}")
    for name in ("net", "ema", "optimizer", "order"):
        assert_same(checkpoint(resumed)[name], checkpoint(long)[name])


def test_resume_from_what_the_published_code_wrote(tmp_path, data):
    for name, key in (("network-snapshot-000001.pkl", "modern"), ("training-state-000001.pt", "training_state_pt")):
        (tmp_path / name).write_bytes(arrays("edm", "snapshot.npz")[key].tobytes())
    state_file = tmp_path / "training-state-000001.pt"
    folder = train(tmp_path / "run", data, "--nosubdir", "--arch=ncsnpp", "--cbase=4", "--lr=1e-9", "--batch=500",
                   "--duration=0.002", f"--resume={state_file}")
    assert [line["Progress/kimg"]["mean"] for line in stats(folder)] == [1.5, 2.0]
    # Two steps at next to no rate: the weights are those of the state, and Adam has counted on.
    state, saved = load_training_state(state_file), checkpoint(folder)
    assert largest_difference(saved["net"], state["net"]) < 1e-6
    assert float(saved["optimizer"]["state"][0]["step"]) == float(state["optimizer_state"]["state"][0]["step"]) + 2


def test_transfer_starts_from_the_weights_of_a_snapshot(tmp_path, data, whole):
    source = whole / "network-snapshot-latest.pkl"
    # One step, of learning rate 0: the network is still that of the snapshot.
    folder = train(tmp_path / "next", data, "--nosubdir", f"--transfer={source}", "--duration=0.001", "--batch=1000")
    assert_same(checkpoint(folder)["net"], load_network(source).state_dict())


# ------------------------------------------------------------------------------------------------------- folders

def test_folders_are_numbered_and_a_run_is_known_by_its_options(tmp_path, data, capsys):
    few = ("--duration=0.0001", "--batch=1000")
    name = "tiny-cond-ddpmpp-edm-gpus1-batch1000-fp32"
    for number, own in enumerate((few, (*few, "--lr=1e-3"))):
        train(tmp_path, data, *own)
        assert (tmp_path / f"{number:05d}-{name}" / RESULT_FILE).exists()
    capsys.readouterr()
    train(tmp_path, data, *few)  # finished, and not the newest one of this name
    assert f"complete: {tmp_path / f'00000-{name}'}" in capsys.readouterr().out
    os.rename(tmp_path / f"00001-{name}", tmp_path / "00001-other")
    (tmp_path / f"00000-{name}" / RESULT_FILE).unlink()  # as if it had been interrupted
    train(tmp_path, data, *few)
    assert (tmp_path / f"00000-{name}" / RESULT_FILE).exists()
    assert sorted(os.listdir(tmp_path)) == [f"00000-{name}", "00001-other"]


def test_an_interrupted_run_keeps_its_random_seed(tmp_path, data):
    command = [f"--outdir={tmp_path}", f"--data={data}", *(flag for flag in TINY if not flag.startswith("--seed")),
               "--duration=0.0001", "--batch=1000", "--nosubdir"]
    main(command)
    seed = read_options(tmp_path)["seed"]
    (tmp_path / RESULT_FILE).unlink()
    main(command)
    assert read_options(tmp_path)["seed"] == seed


def test_a_run_is_known_by_the_content_of_its_data(tmp_path, data):
    few, name = ("--duration=0.0001", "--batch=1000"), "00000-tiny-cond-ddpmpp-edm-gpus1-batch1000-fp32"
    train(tmp_path, data, *few)
    (tmp_path / name / RESULT_FILE).unlink()  # as if it had been interrupted
    moved = tmp_path / "moved" / "tiny.npz"
    moved.parent.mkdir()
    write_npz(read_images(data), moved)
    train(tmp_path, moved, *few)
    assert (tmp_path / name / RESULT_FILE).exists()  # the same images in another file
    moved = write_set(moved.with_suffix(".zip"), seed=1)
    with pytest.raises(UserError, match="other options .another content of --data"):
        train(tmp_path / name, moved, *few, "--nosubdir")
    train(tmp_path, moved, *few)
    assert (tmp_path / name.replace("00000", "00001") / RESULT_FILE).exists()


def test_files_of_a_run(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"training_options.json", "log.txt", "stats.jsonl", "checkpoint.pt", "result.json",
                     "network-snapshot-000000.pkl", "network-snapshot-000001.pkl", "network-snapshot-latest.pkl",
                     "training-state-000001.pt"}
    assert (whole / "network-snapshot-latest.pkl").read_bytes() == (whole / "network-snapshot-000001.pkl").read_bytes()
    net = load_network(whole / "network-snapshot-latest.pkl")
    assert_same(net.state_dict(), checkpoint(whole)["ema"])
    log = (whole / "log.txt").read_text()
    assert "tick 0     kimg 0.0" in log and "<top-level>" in log and "Training options" not in log


# ---------------------------------------------------------------------------------------------------- arithmetic

def test_learning_rate_rises_and_falls():
    rates = [learning_rate(n, 2.0, rampup_kimg=1, total_kimg=10, decay=0.3)
             for n in (0, 500, 1000, 7000, 8500, 10000, 10100)]
    assert rates == pytest.approx([0, 1, 2, 2, 1, 0, 0])


def test_a_batch_is_shared_evenly():
    assert batch_rounds(512, 32, 4) == (32, 4)
    assert batch_rounds(8, None, 2) == (4, 1)
    assert batch_rounds(8, 99, 1) == (8, 1)
    for batch, at_once, ranks in ((15, None, 2), (1, None, 2), (16, 5, 1)):
        with pytest.raises(UserError, match="--batch"):
            batch_rounds(batch, at_once, ranks)


def test_non_finite_gradients_are_replaced_and_counted():
    nan, inf = float("nan"), float("inf")
    gradients = [torch.tensor([1.0, nan]), torch.tensor([[3e5, -3e5]]), torch.tensor([inf, -inf]).to(torch.float32)]
    assert replace_non_finite(gradients) == 2
    assert torch.cat([g.flatten() for g in gradients]).tolist() == [1, 0, 3e5, -3e5, 1e5, -1e5]


@pytest.mark.parametrize("flags", [
    ["--precision=bf16"], ["--strict"], ["--cond=0", "--augment=0"], ["--precond=vp"], ["--xflip=1", "--ls=100"],
    ["--precond=ve", "--arch=ncsnpp"], ["--arch=adm", "--cbase=64"], ["--fp16=1"], ["--cbase=64"],
    ["--ema=0", "--ema-rampup=0.1", "--lr-decay=0.3", "--channel-mult-emb=2", "--sigma-data=0.4", "--p-mean=-1"],
], ids=" ".join)
def test_every_kind_of_run_ends_with_a_network_that_loads(tmp_path, data, flags):
    folder = train(tmp_path, data, "--nosubdir", "--batch=500", *flags)  # 2 steps
    loss = losses(folder)[0]["mean"]
    assert math.isfinite(loss) and loss > 0
    net = load_network(folder / "network-snapshot-latest.pkl")
    images = torch.randn(2, 3, 8, 8)
    assert torch.isfinite(net(images, torch.ones(2))).all()


def test_bf16_computes_nearly_the_same(tmp_path, data, whole):
    rounded = losses(train(tmp_path, data, "--nosubdir", "--precision=bf16"))[-1]["mean"]
    assert rounded != losses(whole)[-1]["mean"] and rounded == pytest.approx(losses(whole)[-1]["mean"], rel=1e-2)


def test_a_state_saved_in_one_memory_layout_serves_another():
    """Adam's moments follow their parameters, element by element, when a channels_last network takes them over."""
    def one_step(layout, state=None):
        weight = torch.nn.Parameter(torch.arange(72.0).view(2, 4, 3, 3).contiguous(memory_format=layout))
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        optimizer.register_load_state_dict_post_hook(keep_layout)
        if state:
            optimizer.load_state_dict(copy.deepcopy(state))
        weight.grad = weight.detach().sin()
        optimizer.step()
        return weight.detach(), optimizer.state_dict()

    state = one_step(torch.contiguous_format)[1]
    expected, ours = (one_step(layout, state)[0] for layout in (torch.contiguous_format, torch.channels_last))
    assert torch.allclose(expected, ours)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data):
    with pytest.raises(Diverged, match="not finite at step"):
        train(tmp_path / "run", data, "--nosubdir", "--lr=1e30", "--lr-rampup=0")
    assert not (tmp_path / "run" / "network-snapshot-000001.pkl").exists()
    assert not (tmp_path / "run" / RESULT_FILE).exists()


# ------------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("more, message", [
    (["--data={tmp}/none.zip"], "--data: .*No such file"),
    (["--data={tmp}/cut.zip"], "--data: .*cut.zip"),
    (["--data={tmp}/unlabelled.zip"], "--cond=True requires labels specified in dataset.json"),
    (["--outdir={tmp}/file"], "file"),
    (["--batch-gpu=5"], "--batch-gpu=5 does not divide the 16 images"),
    (["--transfer={tmp}/none.pkl"], "--transfer: no such file"),
    (["--transfer={tmp}/cut.pkl"], "cut.pkl: .*cut short"),
    (["--transfer={whole}/network-snapshot-latest.pkl", "--cbase=16"], "snapshot of another network"),
    (["--transfer={whole}/checkpoint.pt"], "checkpoint.pt"),
    (["--resume={tmp}/training-state-000001.pt"], "training-state-000001.pt: .*"),
    (["--resume={whole}/training-state-000001.pt", "--cbase=16"], "training-state-000001.pt: .*another network"),
    (["--precond=vp", "--sigma-data=1"], "--sigma-data.*--precond=edm"),
    (["--strict", "--compile=1"], "--strict and --compile=1"),
    (["--device=nonsense"], "unknown device 'nonsense'"),
    (["--cres=1;2"], "'1;2' is not a list"),
    (["--cres=1,1,1,1,1"], "no network .* for images of 8 x 8"),
    (["--cbase=2"], "no network .* for images of 8 x 8"),
    (["--seed=-1"], "'--seed'"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes_end_in_one_line(tmp_path, data, whole, more, message):
    (tmp_path / "cut.zip").write_bytes(data.read_bytes()[:1000])
    (tmp_path / "file").touch()
    write_set(tmp_path / "unlabelled.zip", labels=False)
    (tmp_path / "cut.pkl").write_bytes((whole / "network-snapshot-latest.pkl").read_bytes()[:5000])
    (tmp_path / "training-state-000001.pt").write_bytes((whole / "training-state-000001.pt").read_bytes()[:5000])
    before = outcome(whole)
    with pytest.raises(UserError) as error:
        train(tmp_path / "out", data, "--nosubdir", *(flag.format(tmp=tmp_path, whole=whole) for flag in more))
    text = str(error.value)
    assert "\n" not in text
    assert re.search(message, text), text
    assert_same(outcome(whole), before)
    assert not (tmp_path / "out").exists()


def test_a_run_that_failed_before_its_first_step_is_not_in_the_way(tmp_path, data, whole):
    (tmp_path / "cut.pkl").write_bytes((whole / "network-snapshot-latest.pkl").read_bytes()[:5000])
    few = ("--nosubdir", "--duration=0.0001", "--batch=1000")
    with pytest.raises(UserError):
        train(tmp_path / "out", data, *few, f"--transfer={tmp_path}/cut.pkl")
    train(tmp_path / "out", data, *few)


def test_another_run_in_the_folder_is_not_overwritten(tmp_path, data, whole):
    before = outcome(whole)
    with pytest.raises(UserError, match="optimizer_kwargs.lr: 0.005 there, 0.001 here"):
        train(whole, data, "--nosubdir", "--lr=1e-3")
    assert_same(outcome(whole), before)


def test_a_checkpoint_cut_short_is_replaced_by_the_one_before(tmp_path, data, whole):
    folder = train(tmp_path / "run", data, "--nosubdir", "--checkpoint-seconds=0.1")
    (folder / RESULT_FILE).unlink()
    for name in ("checkpoint.pt", "checkpoint.pt.previous"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2])
        if name == "checkpoint.pt":
            with pytest.warns(UserWarning, match="using .*previous"):
                train(folder, data, "--nosubdir")
            assert_same(checkpoint(folder), checkpoint(whole))
            (folder / RESULT_FILE).unlink()
            (folder / "checkpoint.pt").write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match="checkpoint.pt: cut short"):
        train(folder, data, "--nosubdir")


def test_mistakes_exit_with_status_2(tmp_path, data):
    arguments = ["EDM/train.py", f"--outdir={tmp_path}/out", f"--data={data}", *TINY]
    line = one_line_error(run(*arguments, "--data=none.zip", status=2))
    assert line == "error: --data: [Errno 2] No such file or directory: 'none.zip'"
    line = one_line_error(run(*arguments, "--device=cuda", status=2))
    assert "GPU" in line
    assert not (tmp_path / "out").exists()
