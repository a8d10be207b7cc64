"""What train.py starts from besides nothing: files of the published code; and how it averages the weights."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from EDM.train import main
from EDM.training.networks import PRECONDITIONERS
from EDM.training.snapshots import load_network, read_snapshot
from shared.cli import UserError
from tests.edm.published_form import write_published, write_published_state
from tests.edm.training_runs import TINY, largest_difference, stats, write_set
from tests.shared.programs import assert_same


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "tiny.zip")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "cache"))


def train(outdir: Path, data: Path, *more: str) -> Path:
    main([f"--outdir={outdir}", f"--data={data}", "--nosubdir", *TINY, *more])
    return outdir


@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_every_network_trains_with_every_preconditioning(arch: str, precond: str, data: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", data, f"--arch={arch}", f"--precond={precond}", "--batch=500")
    snapshot = read_snapshot(folder / "network-snapshot-latest.pkl")
    assert snapshot.class_name == {"edm": "EDM", "vp": "VP", "ve": "VE"}[precond] + "Precond"
    assert snapshot.init_kwargs["model_type"] == ("DhariwalUNet" if arch == "adm" else "SongUNet")
    assert all(line["Loss/loss"]["mean"] < 100 for line in stats(folder))


def test_published_training_state_continues(data: Path, tmp_path: Path) -> None:
    """One of ours, rewritten in the published form, goes on as ours does: it lacks the average, which is then that
    of the snapshot beside it, the exact number of images and the place in the data order."""
    first = train(tmp_path / "first", data, "--batch=500")  # 1,000 images: the count in the file's name is exact
    published = tmp_path / "published"
    published.mkdir()
    state = torch.load(first / "training-state-000001.pt", weights_only=True)
    snapshot = read_snapshot(first / "network-snapshot-000001.pkl")
    net = PRECONDITIONERS[snapshot.class_name](**snapshot.init_kwargs)
    write_published(published / "network-snapshot-000001.pkl", snapshot.build(), snapshot.init_kwargs)
    net.load_state_dict(state["net"])
    write_published_state(published / "training-state-000001.pt", net, snapshot.init_kwargs, state["optimizer_state"])

    longer = ("--batch=500", "--duration=0.002")
    ours = train(tmp_path / "ours", data, *longer, f"--resume={first}/training-state-000001.pt")
    theirs = train(tmp_path / "theirs", data, *longer, f"--resume={published}/training-state-000001.pt")
    assert [line["Progress/kimg"]["mean"] for line in stats(theirs)] == [1.5, 2.0]
    assert_same(_end(theirs), _end(ours))


def _end(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {name: checkpoint[name] for name in ("net", "ema", "optimizer")}


def test_published_state_without_its_snapshot_is_refused(data: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", data, "--batch=500")
    snapshot = read_snapshot(first / "network-snapshot-000001.pkl")
    state = torch.load(first / "training-state-000001.pt", weights_only=True)
    write_published_state(tmp_path / "training-state-000001.pt", snapshot.build(), snapshot.init_kwargs,
                          state["optimizer_state"])
    with pytest.raises(UserError, match="network-snapshot-000001.pkl: no such file"):
        train(tmp_path / "run", data, f"--resume={tmp_path}/training-state-000001.pt")


def test_transfer_from_a_published_snapshot(data: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", data, "--batch=500")
    snapshot = read_snapshot(first / "network-snapshot-latest.pkl")
    write_published(tmp_path / "edm.pkl", snapshot.build(), snapshot.init_kwargs)
    folder = train(tmp_path / "run", data, f"--transfer={tmp_path}/edm.pkl", "--batch=1000")
    # The only step has learning rate 0, so the weights are those of the file.
    assert largest_difference(load_network(folder / "network-snapshot-latest.pkl").state_dict(),
                              snapshot.state_dict) < 1e-7


def test_power_law_average_replaces_the_half_life(data: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", data, "--batch=250")
    power = train(tmp_path / "power", data, "--batch=250", "--ema-sigma-rel=0.28")
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (plain, power))
    assert_same(first["net"], second["net"])
    assert largest_difference(first["ema"], second["ema"]) > 1e-4
    # Nearly the plain average of the four steps, the first of which has learning rate 0.
    assert largest_difference(second["ema"], second["net"]) > 1e-4
    with pytest.raises(UserError, match="--ema-rampup belongs to the half-life"):
        train(tmp_path / "both", data, "--ema-sigma-rel=0.1", "--ema-rampup=0.05")


def test_label_dropout_trains_the_guide_of_classifier_free_guidance(data: Path, tmp_path: Path) -> None:
    nets = {}
    for share in ("0", "0.5", "1"):
        folder = train(tmp_path / share, data, "--batch=250", f"--label-dropout={share}")
        assert read_snapshot(folder / "network-snapshot-latest.pkl").init_kwargs["label_dropout"] == float(share)
        nets[share] = load_network(folder / "network-snapshot-latest.pkl").state_dict()
    # Without any class, nothing is learnt about classes.
    start = load_network(tmp_path / "1" / "network-snapshot-000000.pkl").state_dict()
    weight = "model.map_label.weight"
    assert torch.equal(nets["1"][weight], start[weight])
    assert not torch.equal(nets["0.5"][weight], start[weight])
    assert largest_difference(nets["0.5"], nets["0"]) > 1e-4
    with pytest.raises(UserError, match="--label-dropout needs a class-conditional model"):
        train(tmp_path / "run", data, "--cond=0", "--label-dropout=0.1")
