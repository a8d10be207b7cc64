"""train_classifier.py and train_noise.py: interruptions, ranks, the noise they agree on, every network, mistakes."""
from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from EDM import dataset_tool, generate, train_classifier, train_noise
from EDM.tdsm.classifiers import CLASSIFIERS, volmin_transition
from EDM.tdsm.transition import transition_matrix
from EDM.training.config import RESULT_FILE
from EDM.training.snapshots import load_network, read_snapshot
from shared.cli import UserError
from tests.edm.training_runs import checkpoint, largest_difference, losses, outcome, stats, write_set
from tests.shared.programs import assert_same, one_line_error, run, start, wait_until

BASE = ("--cond=1", "--tick=1", "--dump=1", "--seed=3", "--lr=5e-3", "--lr-rampup=0.2", "--device=cpu", "--nosubdir")
SHORT, LONG = ("--batch=250", "--duration=0.001"), ("--batch=16", "--duration=0.001")  # 4 and 63 steps
CLASSIFIER = ("--classifier=cnn", "--cbase=8", "--accuracy-images=20")
DENOISER = ("--cbase=8", "--cres=1,1", "--num-blocks=1", "--attn-resolutions=4")
RATE = 0.4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the programs that are started, since sums depend on it in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tdsm")


def call(script: ModuleType, outdir: Path, data: Path, *more: str) -> Path:
    """Run a training script in this process and return the run's folder."""
    script.main([f"--outdir={outdir}", f"--data={data}", *BASE, *more])
    return Path(outdir)


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """30 images of 3 classes, 40 % of the labels wrong."""
    path = folder / "set_sym_40-8x8.zip"
    dataset_tool.main([f"--source={write_set(folder / 'clean.zip', count=30)}", f"--dest={path}",
                            "--noise_type=sym", f"--noise_rate={RATE}"])
    return path


@pytest.fixture(scope="module")
def classifier(folder: Path, data: Path) -> Path:
    return call(train_classifier, folder / "classifier", data, *CLASSIFIER, *LONG)


def snapshot_of(run_folder: Path) -> Path:
    return run_folder / "network-snapshot-latest.pkl"


@pytest.fixture(scope="module")
def denoiser(folder: Path, data: Path, classifier: Path) -> Path:
    return call(train_noise, folder / "denoiser", data, *DENOISER, *LONG, f"--cls={snapshot_of(classifier)}")


# ------------------------------------------------------------------------------------------- interruptions and ranks

@pytest.mark.parametrize("name", ["classifier", "denoiser"])
def test_killed_and_started_again_gives_the_same_bits(name, tmp_path, data, classifier, denoiser):
    script, own, whole = (train_classifier, CLASSIFIER, classifier) if name == "classifier" else \
        (train_noise, (*DENOISER, f"--cls={snapshot_of(classifier)}"), denoiser)
    folder = tmp_path / "run"
    saved = folder / "checkpoint.pt"
    for _ in range(2):
        before = saved.stat().st_mtime_ns if saved.exists() else None
        process = start(f"EDM/{script.__name__.rpartition('.')[2]}.py", f"--outdir={folder}", f"--data={data}", *BASE,
                        *own, *LONG, "--checkpoint-seconds=0.1")
        wait_until(lambda before=before: saved.exists() and saved.stat().st_mtime_ns != before, process)
        process.kill()
        process.communicate()
    assert not (folder / RESULT_FILE).exists()
    assert 0 < checkpoint(folder)["step"] < 63
    call(script, folder, data, *own, *LONG)
    assert_same(outcome(folder), outcome(whole))
    if name == "classifier":
        assert json.loads((folder / "accuracy.json").read_text()) == json.loads((whole / "accuracy.json").read_text())


@pytest.mark.parametrize("kind", [("--classifier=cnn", "--cbase=8"),
                                  # With batch normalisation, whose statistics are those of the global batch.
                                  pytest.param(("--classifier=resnet18",), marks=pytest.mark.slow)])
def test_two_processes_train_the_same_classifier(kind, tmp_path, data):
    """By SGD, as Adam's first steps are as long for a gradient of rounding noise as for the largest."""
    flags = (*kind, "--accuracy-images=10", "--optimizer=sgd", *SHORT)
    one = call(train_classifier, tmp_path / "one", data, *flags)
    run("EDM/train_classifier.py", f"--outdir={tmp_path / 'two'}", f"--data={data}", *BASE, *flags, ranks=2)
    for ours, theirs in zip(losses(tmp_path / "two"), losses(one), strict=True):
        assert ours["num"] == theirs["num"]
        assert ours["mean"] == pytest.approx(theirs["mean"], rel=1e-4)
    assert largest_difference(checkpoint(tmp_path / "two")["net"], checkpoint(one)["net"]) < 5e-4


def test_two_processes_train_the_same_denoiser(tmp_path, data, classifier, denoiser):
    run("EDM/train_noise.py", f"--outdir={tmp_path / 'two'}", f"--data={data}", *BASE, *DENOISER, *LONG,
        f"--cls={snapshot_of(classifier)}", ranks=2)
    for ours, theirs in zip(stats(tmp_path / "two"), stats(denoiser), strict=True):
        for name in ("Loss/loss", "Loss/dsm", "Loss/candidates", "Loss/kept_mass"):
            assert ours[name]["mean"] == pytest.approx(theirs[name]["mean"], rel=1e-3), name
    for name in ("net", "ema"):
        assert largest_difference(checkpoint(tmp_path / "two")[name], checkpoint(denoiser)[name]) < 1e-3


def test_accumulation_changes_nothing_beyond_rounding(tmp_path, data, classifier, denoiser):
    parts = call(train_noise, tmp_path / "parts", data, *DENOISER, *LONG, f"--cls={snapshot_of(classifier)}",
                 "--batch-gpu=4", "--pairs-gpu=3")
    for ours, theirs in zip(stats(parts), stats(denoiser), strict=True):
        for name in ("Loss/loss", "Loss/dsm", "Loss/candidates"):
            assert ours[name]["mean"] == pytest.approx(theirs[name]["mean"], rel=1e-3), name
    assert largest_difference(checkpoint(parts)["net"], checkpoint(denoiser)["net"]) < 1e-3


def test_a_classifier_goes_on_from_a_training_state_and_from_a_snapshot(tmp_path, data):
    flags = (*CLASSIFIER, "--batch=250")
    whole = call(train_classifier, tmp_path / "whole", data, *flags, "--duration=0.002")
    half = call(train_classifier, tmp_path / "half", data, *flags, "--duration=0.001")
    rest = call(train_classifier, tmp_path / "rest", data, *flags, "--duration=0.002",
                f"--resume={half / 'training-state-000001.pt'}")
    assert_same(checkpoint(rest)["net"], checkpoint(whole)["net"])
    started = call(train_classifier, tmp_path / "started", data, *flags, "--duration=0.001", "--lr=1e-30",
                   f"--transfer={snapshot_of(half)}")
    assert_same(read_snapshot(snapshot_of(started)).state_dict, read_snapshot(snapshot_of(half)).state_dict)


# ------------------------------------------------------------------------------------------------ what a run leaves

def test_accuracy_is_logged_and_drawn_at_every_noise_level(classifier):
    content = json.loads((classifier / "accuracy.json").read_text())
    assert content["history"][-1].keys() == {"nimg", "observed", "clean"}
    last = stats(classifier)[-1]
    for sigma, value in zip(content["sigma"], content["history"][-1]["clean"], strict=True):
        assert last[f"Accuracy/clean@sigma={sigma:g}"]["mean"] == pytest.approx(value)
    assert (classifier / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((classifier / RESULT_FILE).read_text())["accuracy"]["last"] == content["history"][-1]["clean"][0]


def test_the_loss_counts_one_value_an_image_for_classifiers_and_one_a_pixel_for_denoisers(classifier, denoiser):
    assert losses(classifier)[0]["num"] == 16
    assert losses(denoiser)[0]["num"] == 16 * 3 * 8 * 8


def test_the_snapshots_carry_the_transition_matrix(classifier, denoiser):
    for folder in (classifier, denoiser):
        said = read_snapshot(snapshot_of(folder)).loss_kwargs
        assert np.allclose(said["transition_matrix"], transition_matrix("sym", RATE, 3))
        assert (said["noise_type"], said["noise_rate"]) == ("sym", RATE)


def test_the_whole_chain_to_a_sheet_of_samples(tmp_path, denoiser, capsys):
    generate.main([f"--outdir={tmp_path / 'out'}", "--seeds=0-3", "--steps=3", "--class=0", "--device=cpu",
                        f"--network={snapshot_of(denoiser)}"])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "000000.png", "000001.png", "000002.png", "000003.png", "grid-0-000000-000003.png"]


def test_the_affine_score_of_equal_networks_is_theirs(tmp_path, denoiser):
    images = []
    for name, more in (("one", ()), ("two", (f"--network_2={snapshot_of(denoiser)}", "--affine_weight=0.5"))):
        generate.main([f"--outdir={tmp_path / name}", "--seeds=0-3", "--steps=3", "--device=cpu",
                            "--save_each_sample", f"--network={snapshot_of(denoiser)}", *more])
        assert len(list((tmp_path / name).glob("*.png"))) == 4
        images.append((tmp_path / name / "000002.png").read_bytes())
    assert images[0] == images[1]


# -------------------------------------------------------------------------------------------------- the noise is agreed

def test_noise_by_the_name_of_the_set(tmp_path, capsys):
    data = write_set(tmp_path / "cifar10_sym_20-8x8.zip")
    call(train_classifier, tmp_path / "run", data, *CLASSIFIER, *SHORT)
    assert "label noise: sym 0.2 (by the name of --data)" in capsys.readouterr().out
    assert np.allclose(read_snapshot(snapshot_of(tmp_path / "run")).loss_kwargs["transition_matrix"],
                       transition_matrix("sym", 0.2, 10))


def test_a_learned_matrix(tmp_path, data, capsys):
    flags = (*CLASSIFIER, *LONG, "--precond=edm_vm", "--vm-schedule=0,0,0", "--lr=0.05")
    fixed = call(train_classifier, tmp_path / "fixed", data, *flags)
    assert (read_snapshot(snapshot_of(fixed)).state_dict["transition_matrix"] == -2).all()  # fixed from the start
    learned = call(train_classifier, tmp_path / "learned", data, *CLASSIFIER, *LONG, "--noise_type=learn")
    raw = read_snapshot(snapshot_of(learned)).state_dict["transition_matrix"]
    assert (raw != -2).sum() == 6  # all but the diagonal, which is 1 whatever the raw matrix says
    assert "transition matrix: 3 classes" in capsys.readouterr().out
    assert "Transition/error" in stats(learned)[-1]
    cls = f"--cls={snapshot_of(learned)}"
    run_folder = call(train_noise, tmp_path / "denoiser", data, *DENOISER, *SHORT, cls, "--noise_type=learn",
                      "--precond=vp")
    assert np.allclose(read_snapshot(snapshot_of(run_folder)).loss_kwargs["transition_matrix"],
                       volmin_transition(raw.double()).numpy())
    with pytest.raises(UserError, match="was trained for learn"):
        call(train_noise, tmp_path / "no", data, *DENOISER, *SHORT, cls, "--noise_type=sym", "--noise_rate=0.4")


def test_accuracy_on_other_images(tmp_path, data, folder):
    run_folder = call(train_classifier, tmp_path / "run", data, *CLASSIFIER, *SHORT,
                      f"--eval-data={folder / 'clean.zip'}")
    assert json.loads((run_folder / "accuracy.json").read_text())["history"][0].keys() == {"nimg", "clean"}
    gray = write_set(tmp_path / "gray.zip", channels=1)
    with pytest.raises(UserError, match="--eval-data: .*gray.zip needs class labels below 3 and images of 3 x 8 x 8"):
        call(train_classifier, tmp_path / "no", data, *CLASSIFIER, *SHORT, f"--eval-data={gray}")


def test_a_matrix_from_a_file(tmp_path, data):
    matrix = np.array([[0.8, 0.2, 0], [0, 0.7, 0.3], [0.1, 0, 0.9]])
    (tmp_path / "T.json").write_text(json.dumps({"transition_matrix": matrix.tolist()}))
    np.save(tmp_path / "T.npy", matrix)
    cls = call(train_classifier, tmp_path / "c", data, *CLASSIFIER, *SHORT, f"--transition={tmp_path / 'T.json'}")
    assert np.allclose(read_snapshot(snapshot_of(cls)).loss_kwargs["transition_matrix"], matrix)
    call(train_noise, tmp_path / "d", data, *DENOISER, *SHORT, f"--cls={snapshot_of(cls)}",
         f"--transition={tmp_path / 'T.npy'}", "--noise_type=file")
    with pytest.raises(UserError, match="differs from sym 0.4"):
        call(train_noise, tmp_path / "n", data, *DENOISER, *SHORT, f"--cls={snapshot_of(cls)}", "--noise_type=sym",
             "--noise_rate=0.4")


def test_clean_labels_need_no_classifier(tmp_path, data):
    folder = call(train_noise, tmp_path / "run", data, *DENOISER, *SHORT, "--noise_type=clean", "--augment=0")
    assert all(line["Loss/candidates"]["mean"] == 0 for line in stats(folder))
    assert [line["Loss/loss"]["mean"] for line in stats(folder)][0] == pytest.approx(
        stats(folder)[0]["Loss/dsm"]["mean"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------ every network

@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
@pytest.mark.parametrize("arch", ["ddpmpp", "ddpmpp_mnist", "ncsnpp", "adm"])
def test_every_denoiser(arch, precond, tmp_path, data, classifier):
    folder = call(train_noise, tmp_path / "run", data, *DENOISER, *SHORT, f"--arch={arch}", f"--precond={precond}",
                  f"--cls={snapshot_of(classifier)}", "--noise_type=sym", f"--noise_rate={RATE}", "--label-dropout=0.3",
                  "--augment=0")
    assert type(load_network(snapshot_of(folder))).__name__ == f"{precond.upper()}Precond"
    assert all(np.isfinite(line["Loss/loss"]["mean"]) for line in stats(folder))


@pytest.mark.parametrize(("arch", "precond"), [("ddpmpp", "vp"), ("ncsnpp", "ve"), ("adm", "edm_vm")])
def test_every_classifier(arch, precond, tmp_path, data):
    more = ("--classifier=cnn",) if arch != "adm" else ()
    folder = call(train_classifier, tmp_path / "run", data, *more, "--accuracy-images=5", "--cbase=8", *SHORT,
                  f"--arch={arch}", f"--precond={precond}", "--optimizer=sgd", "--averaged=1")
    snapshot = read_snapshot(snapshot_of(folder))
    assert snapshot.class_name.startswith(precond[:3].upper().rstrip("_"))
    assert snapshot.build(CLASSIFIERS).label_dim == 3


# ----------------------------------------------------------------------------------------------------------- mistakes

def write_matrix(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows))
    return path


MATRICES = [([[1, 0, 0], [0, 1, 0]], "a transition matrix is square, this one is 2 x 3"),
            ([[1, 0, 0], [0, 1], [0, 0, 1]], "expected a square table of numbers"),
            ([[0.5, 0, 0], [0, 1, 0], [0, 0, 1]], "its row 0 sums to 0.5, expected 1"),
            ([[1.5, -0.5, 0], [0, 1, 0], [0, 0, 1]], r"its entry \[0, 0\] is 1.5"),
            ([[0.5, 0, 0], [0.5, 1, 0], [0, 0, 1]], "it seems to be transposed"),
            ([[1, 0], [0, 1]], "transition matrix of 2 classes, but the data has 3"),
            ([["1", "0", "0"], ["0", "1", "0"], ["0", "0", "1"]], "expected a square table of numbers"),
            ([[1, 0, 0], [0, None, 1], [0, 0, 1]], "expected a square table of numbers"),
            ([[0, 1, 0], [0, 1, 0], [0, 0, 1]], "the labels hold class 0, which its transition matrix makes")]


@pytest.mark.parametrize(("rows", "message"), MATRICES)
def test_unfit_matrices(rows, message, tmp_path, data):
    path = write_matrix(tmp_path / "T.json", rows)
    with pytest.raises(UserError, match=message):
        call(train_classifier, tmp_path / "run", data, *CLASSIFIER, *SHORT, f"--transition={path}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rate", ["1", "-0.1", "1.5", "nan"])
@pytest.mark.parametrize("script", [train_classifier, train_noise])
def test_rates_outside(script, rate, tmp_path, data, classifier):
    more = (*DENOISER, f"--cls={snapshot_of(classifier)}") if script is train_noise else CLASSIFIER
    with pytest.raises(UserError, match="'--noise_rate': .* is not (in the range 0<=x<1|a finite number)"):
        call(script, tmp_path / "run", data, *more, *SHORT, "--noise_type=sym", f"--noise_rate={rate}")
    assert not (tmp_path / "run").exists()


def test_one_line_and_status_2(tmp_path, data):
    for script in ("train_classifier", "train_noise"):
        result = run(f"EDM/{script}.py", f"--outdir={tmp_path / 'run'}", f"--data={data}", *BASE, "--noise_type=sym",
                     "--noise_rate=1.0", f"--cls={data}" if script == "train_noise" else "--classifier=cnn", status=2)
        assert one_line_error(result)
    assert not (tmp_path / "run").exists()


def test_classifiers_that_do_not_fit(tmp_path, data, classifier, denoiser):
    other = write_set(tmp_path / "gray.zip", channels=1)
    cls = f"--cls={snapshot_of(classifier)}"
    with pytest.raises(UserError, match="is a classifier for 3 image channels, but the data has 1"):
        call(train_noise, tmp_path / "run", other, *DENOISER, *SHORT, cls)
    with pytest.raises(UserError, match="is a classifier for 3 classes, but the data has 10"):
        call(train_noise, tmp_path / "run", data, *DENOISER, *SHORT, cls, "--dataset=cifar10")
    with pytest.raises(UserError, match="holds a EDMPrecond .*expected a classifier"):
        call(train_noise, tmp_path / "run", data, *DENOISER, *SHORT, f"--cls={snapshot_of(denoiser)}")
    with pytest.raises(UserError, match="holds a EDMPrecond_classifier.* expected a denoiser"):
        generate.main([f"--outdir={tmp_path / 'out'}", f"--network={snapshot_of(classifier)}", "--device=cpu"])
    with pytest.raises(UserError, match="was trained for sym 0.4"):
        call(train_noise, tmp_path / "run", data, *DENOISER, *SHORT, cls, "--noise_type=sym", "--noise_rate=0.2")
    with pytest.raises(UserError, match="has learned no transition matrix"):
        call(train_noise, tmp_path / "run", data, *DENOISER, *SHORT, cls, "--noise_type=learn")


MISTAKES = [
    (train_noise, (), "--cls: the snapshot of a classifier is needed"),
    (train_noise, ("--cond=0", "--noise_type=clean"), "this script learns from labels: add --cond=1"),
    (train_classifier, ("--cond=0",), "this script learns from labels: add --cond=1"),
    (train_classifier, ("--noise_type=sym",), "--noise_type=sym needs --noise_rate, the fraction of wrong labels"),
    (train_classifier, ("--noise_rate=0.4",), "--noise_rate needs --noise_type"),
    (train_classifier, ("--noise_type=file",), "--noise_type=file needs the file"),
    (train_classifier, ("--transition=T.txt",), "expected a transition matrix in a .json or .npy file"),
    (train_classifier, ("--transition=absent.npy",), "absent.npy: no such file"),
    (train_classifier, ("--noise_type=asym", "--noise_rate=0.4"), "asymmetric noise is defined for mnist"),
    (train_classifier, ("--precond=edm_tv",), "--precond=edm_tv: a transition matrix that depends on time"),
    (train_classifier, ("--precond=edm_vm", "--noise_type=sym"), "--precond=edm_vm learns the transition matrix"),
    (train_classifier, ("--precond=vp", "--noise_type=learn"), "--noise_type=learn goes with --precond=edm"),
    (train_classifier, ("--vm-schedule=3,2,1", "--precond=edm_vm"), "expected three rising numbers"),
    (train_classifier, ("--eval-data=absent.zip",), "absent.zip"),
    (train_classifier, ("--classifier=cnn", "--arch=adm"), "--classifier=cnn needs --arch=ddpmpp"),
]


@pytest.mark.parametrize(("script", "flags", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(script, flags, message, tmp_path, data):
    own = DENOISER if script is train_noise else ("--cbase=8",)
    with pytest.raises(UserError, match=message):
        call(script, tmp_path / "run", data, *own, *SHORT, *flags)
    assert not (tmp_path / "run").exists()
