"""The linear probe: a grid is its single probes, stored features, continuation, any number of processes, mistakes."""
from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from DDAE import finetune, linear, noisy_classifier_DDAE
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.ddae.tiny import DDPM, LINEAR, TEST, call_in, killed, make_folder, result
from tests.shared.programs import assert_same, one_line_error, run

GRID = ("--grid", "--times=3,4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def grid(folder: Path) -> Path:
    """The folder of results of a grid over two levels and all blocks."""
    call_in(folder, linear, "--epoch=2", *GRID)
    return folder / "out" / "linear" / "ep2_grid"


def test_grid_leaves_table_and_pictures(grid: Path) -> None:
    content = result(grid)
    blocks = ["out_1", "out_2", "out_3", "out_4"]
    assert list(content["probes"]) == [f"{level}/{block}" for level in (3, 4) for block in blocks]
    assert content["accuracy"]["last"] == content["probes"]["4/out_2"]
    assert content["accuracy"]["best_on_test"] == max(content["probes"].values())
    # Shares of the test items, each counted once.
    counts = np.array(list(content["probes"].values())) * TEST
    assert np.allclose(counts, counts.round())
    rows = list(csv.reader((grid / "table.csv").open()))
    assert rows[0] == ["time", *blocks] and [row[0] for row in rows[1:]] == ["3", "4"]
    assert float(rows[2][2]) == pytest.approx(100 * content["probes"]["4/out_2"], abs=0.01)
    for picture in ("grid.png", "curves.png"):
        assert min(Image.open(grid / picture).size) > 100


@pytest.mark.parametrize("key", ["4/out_2", "3/out_4"])
def test_grid_equals_single_probes(folder: Path, grid: Path, tmp_path: Path, key: str) -> None:
    level, block = key.split("/")
    call_in(folder, linear, "--epoch=2", f"--times={level}", f"--blocks={block}", f"--outdir={tmp_path}")
    alone, among = (read_checkpoint(path / "heads.pth")[key] for path in (tmp_path, grid))
    for part in ("weight", "bias"):
        torch.testing.assert_close(alone[part], among[part], atol=1e-5, rtol=1e-5)
    assert result(tmp_path)["probes"][key] == result(grid)["probes"][key]


def test_default_is_the_probe_of_the_config(folder: Path) -> None:
    call_in(folder, linear, "--epoch=1", "--steps=2")  # a trial, which goes on
    assert not (folder / "out" / "linear" / "ep1_4_out_2" / "result.json").exists()
    call_in(folder, linear, "--epoch=1")
    out = folder / "out" / "linear" / "ep1_4_out_2"
    content, names = result(out), [str(label) for label in range(10)]
    assert content["classes"] == read_checkpoint(out / "checkpoint.pt")["classes"] == names
    assert list(content["probes"]) == ["4/out_2"]
    assert content["iterations"] == LINEAR["n_epoch"] * 3


def test_killed_and_continued_is_bitwise_the_same(folder: Path, grid: Path, tmp_path: Path) -> None:
    flags = ("--config=tiny.yaml", "--device=cpu", "--epoch=2", *GRID, f"--outdir={tmp_path}")
    killed(folder, "DDAE.linear", *flags, at=4)
    assert not (tmp_path / "result.json").exists()
    call_in(folder, linear, "--epoch=2", *GRID, f"--outdir={tmp_path}")
    assert_same(read_checkpoint(tmp_path / "heads.pth"), read_checkpoint(grid / "heads.pth"))
    assert result(tmp_path)["probes"] == result(grid)["probes"]


def test_two_processes_do_what_one_does(folder: Path, grid: Path, tmp_path: Path) -> None:
    # Two processes with half the batch and half the rate each.
    run("DDAE/linear.py", "--config=tiny.yaml", "--device=cpu", "--epoch=2", *GRID, "--set=linear.batch_size=10",
        "--set=linear.lrate=5e-3", f"--outdir={tmp_path}", cwd=folder, ranks=2)
    ones, twos = (read_checkpoint(path / "heads.pth") for path in (grid, tmp_path))
    for key in ones:
        torch.testing.assert_close(twos[key], ones[key], atol=1e-4, rtol=1e-3)
    assert result(tmp_path)["probes"] == pytest.approx(result(grid)["probes"], abs=1.01 / TEST)


def test_stored_features_are_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from DDAE.ddae import features as feature_files

    call_in(folder, linear, "--epoch=2", *GRID, "--copies=2", f"--outdir={tmp_path / 'first'}")
    files = list((folder / "out" / "features").glob("ep2-*/*.npy"))
    assert len(files) == 2 * 2 * 4 and not [path for path in files if path.name.endswith(".part.npy")]
    assert all(np.isfinite(np.load(path)).all() for path in files)

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(feature_files, "compute", refuse)
    call_in(folder, linear, "--epoch=2", "--copies=2", f"--outdir={tmp_path / 'second'}")
    alone, among = (read_checkpoint(tmp_path / name / "heads.pth")["4/out_2"] for name in ("second", "first"))
    torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-5)


def test_stored_features_are_those_of_the_images_there_are(tmp_path: Path) -> None:
    make_folder(tmp_path / "digits", epochs=(2,))
    folder = tmp_path / "digits"
    call_in(folder, linear, "--epoch=2", "--copies=1")
    heads = read_checkpoint(folder / "out" / "linear" / "ep2_4_out_2" / "heads.pth")
    path = folder / "digits.npz.d" / "train.npz"
    content = dict(np.load(path))
    np.savez(path, **{**content, "labels": 9 - content["labels"]})  # the same images, classes exchanged
    call_in(folder, linear, "--epoch=2", "--copies=1")
    assert len(list((folder / "out" / "features").iterdir())) == 2
    again = read_checkpoint(folder / "out" / "linear" / "ep2_4_out_2" / "heads.pth")
    assert not torch.equal(again["4/out_2"]["weight"], heads["4/out_2"]["weight"])
    # Moved, the same images are the same.
    (folder / "digits.npz.d").rename(folder / "moved.npz.d")
    call_in(folder, linear, "--epoch=2", "--copies=1", "--set=dataset=moved.npz.d")
    assert len(list((folder / "out" / "features").iterdir())) == 2


def test_features_half_stored_are_completed(folder: Path, tmp_path: Path) -> None:
    flags = ("--epoch=2", "--copies=1", "--seed=5")
    call_in(folder, linear, *flags, f"--outdir={tmp_path / 'whole'}")
    (path,) = (path for path in (folder / "out" / "features").glob("ep2-*/0_4_out_2.npy")
               if "out_1" not in {other.stem[4:] for other in path.parent.iterdir()})
    whole = np.load(path)
    partial = whole.copy()
    partial[7:9], partial[-1, 3:] = np.nan, np.nan
    np.save(path.with_name("0_4_out_2.part.npy"), partial)
    path.unlink()
    call_in(folder, linear, *flags, f"--outdir={tmp_path / 'again'}")
    assert np.allclose(np.load(path), whole, atol=1e-5) and np.array_equal(np.load(path)[10:20], whole[10:20])


def test_classes_are_matched_by_name(folder: Path, tmp_path: Path) -> None:
    """Test images whose file numbers the classes the other way round."""
    shutil.copytree(folder, tmp_path / "copy")
    place, renamed = tmp_path / "copy", [f"c{label}" for label in range(10)]
    for split in ("train", "test"):
        file = place / "digits.npz.d" / f"{split}.npz"
        np.savez(file, **{**np.load(file), "classes": renamed})
    before = probed(place, tmp_path / "before")
    np.savez(file, **{**np.load(file), "labels": 9 - np.load(file)["labels"], "classes": renamed[::-1]})
    assert probed(place, tmp_path / "after") == before


def probed(place: Path, out: Path) -> dict[str, float]:
    call_in(place, linear, f"--outdir={out}")
    return result(out)["probes"]


def test_test_draws_are_averaged_and_training_settings_start_anew(folder: Path, tmp_path: Path) -> None:
    call_in(folder, linear, "--epoch=2", "--test_draws=3", f"--outdir={tmp_path}")
    assert result(tmp_path)["test_draws"] == 3
    first = read_checkpoint(tmp_path / "heads.pth")
    call_in(folder, linear, "--epoch=2", "--set=linear.lrate=0.02", f"--outdir={tmp_path}")
    assert not torch.equal(read_checkpoint(tmp_path / "heads.pth")["4/out_2"]["weight"], first["4/out_2"]["weight"])


@pytest.mark.parametrize("encoder", ["untrained", "pixels"])
def test_comparisons(folder: Path, tmp_path: Path, encoder: str) -> None:
    call_in(folder, linear, f"--encoder={encoder}", f"--outdir={tmp_path}")
    assert list(result(tmp_path)["probes"]) == ["4/pixels" if encoder == "pixels" else "4/out_2"]


def test_ddpm_and_half_precision(tmp_path: Path) -> None:
    make_folder(tmp_path / "ddpm", **DDPM)
    call_in(tmp_path / "ddpm", linear, "--epoch=1", "--grid", "--use_amp")
    content = result(tmp_path / "ddpm" / "out" / "linear" / "ep1_grid")
    assert {key.partition("/")[0] for key in content["probes"]} == {"1", "11", "21"}
    assert content["precision"] == "bf16"


@pytest.mark.parametrize(("flags", "message"), [
    (("--epoch=2", "--blocks=out_2,out_9"), "no block 'out_9'.*it has out_1, out_2, out_3, out_4"),
    (("--epoch=7",), "no checkpoint .*model_7.pth; there are the epochs 1, 2"),
    (("--epoch=2", "--times=4,19"), "noise level 19: EDM features are taken at 1 to 18"),
    (("--epoch=2", "--times=a"), "'--times': 'a' is not a list like 1,2,5-10"),
    (("--epoch=2", "--set=network.n_blocks=2"), "made with another config"),
    (("--epoch=2", "--set=dataset=nothing"), "dataset 'nothing': expected cifar, cifar100, tiny, digits"),
    (("--network=nothing.pkl",), "nothing.pkl"),
    (("--network=nothing.pkl", "--encoder=pixels"), "--network and --encoder pixels contradict"),
])
def test_mistakes(folder: Path, flags: tuple[str, ...], message: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        call_in(folder, linear, *flags)
    assert sorted(folder.rglob("*")) == before


def test_a_mistake_is_one_line(folder: Path) -> None:
    failed = run("DDAE/linear.py", "--config=tiny.yaml", "--epoch=7", cwd=folder, status=2)
    assert "there are the epochs 1, 2" in one_line_error(failed)


def test_a_snapshot_is_probed_by_the_same_commands(folder: Path, tmp_path: Path) -> None:
    from EDM.training.networks import EDMPrecond
    from EDM.training.snapshots import save_snapshot

    torch.manual_seed(0)
    net = EDMPrecond(img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=16, channel_mult=[1, 2],
                     num_blocks=1, attn_resolutions=[])
    save_snapshot(tmp_path / "network-snapshot-000001.pkl", net)
    shutil.copytree(folder / "digits.npz.d", tmp_path / "digits.npz.d")
    shutil.copy(folder / "tiny.yaml", tmp_path)
    snapshot = f"--network={tmp_path / 'network-snapshot-000001.pkl'}"
    call_in(tmp_path, linear, snapshot, "--grid")
    assert len(result(tmp_path / "out" / "linear" / "network-snapshot-000001_grid")["probes"]) == 3 * 4
    call_in(tmp_path, noisy_classifier_DDAE, snapshot)
    assert len(result(tmp_path / "out" / "noisy_classifier" / "network-snapshot-000001_out_2")["by_level"]) == 18
    call_in(tmp_path, finetune, snapshot, "--epochs=1")
    tuned = tmp_path / "out" / "finetune" / "network-snapshot-000001_4_out_2"
    changed = {name for name, value in read_checkpoint(tuned / "checkpoint.pt")["net"].items()
               if name.startswith("body.net.") and not torch.equal(value, net.state_dict()[name[len("body.net."):]])}
    assert changed and not [name for name in changed if ".dec.8x8_aux" in name or "out_conv" in name]
