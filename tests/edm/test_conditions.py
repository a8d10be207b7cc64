"""A network is asked for what it was trained on: classes in their proportion, or lists of numbers that occurred."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from EDM import example, generate, train
from EDM.sampling.conditions import Conditions, describe_labels, read_conditions
from EDM.sampling.seeds import SeedSampler
from EDM.training.snapshots import load_network, read_snapshot
from shared.cli import UserError
from shared.data.images import read_images

TINY = ["--cond=1", "--arch=ddpmpp", "--cbase=8", "--cres=1,1", "--augment=0", "--duration=0.001", "--batch=4",
        "--tick=1", "--snap=1", "--seed=0", "--device=cpu", "--nosubdir", "--dropout=0"]


def trained_on(data: Path, folder: Path) -> Path:
    train.main([f"--data={data}", f"--outdir={folder}", *TINY])
    return folder / "network-snapshot-latest.pkl"


def images(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (8, 8), 20 * index).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_numbered_folders_with_gaps(tmp_path: Path) -> None:
    network = trained_on(images(tmp_path / "set", {"1": 1, "2": 1, "10": 6}), tmp_path / "run")
    described = read_snapshot(network).dataset_kwargs
    assert described["label_counts"] == [0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 6] and "class_names" not in described
    sampler = SeedSampler(load_network(network), num_steps=2)
    drawn = np.bincount(sampler.classes(range(400)), minlength=11)
    assert set(np.flatnonzero(drawn)) == {1, 2, 10} and abs(drawn[10] / 400 - 0.75) < 0.08
    out = tmp_path / "out.zip"
    flags = [f"--network={network}", "--seeds=0-1", "--steps=2", "--device=cpu"]
    with pytest.warns(UserWarning, match="without images of class 0, 3, 4, 5, 6, 7, 8, 9: left out"):
        generate.main([*flags, f"--outdir={out}", "--classes=all"])
    assert read_images(out).labels.tolist() == [1, 1, 2, 2, 10, 10]
    with pytest.raises(UserError, match="without an image of class 3; it knows 1, 2, 10"):
        generate.main([*flags, f"--outdir={tmp_path}/none", "--class=3"])
    example.main([f"--network={network}", f"--outdir={tmp_path}", "--preset=cifar10", "--steps=1", "--device=cpu"])


def test_names_travel_to_the_generated_images(tmp_path: Path) -> None:
    network = trained_on(images(tmp_path / "set", {"cat": 3, "owl": 3}), tmp_path / "run")
    assert read_snapshot(network).dataset_kwargs["class_names"] == ["cat", "owl"]
    for out in (tmp_path / "out.zip", tmp_path / "out.npz"):
        generate.main([f"--network={network}", "--seeds=0-1", "--steps=2", "--device=cpu", f"--outdir={out}",
                       "--classes=all"])
        assert read_images(out).classes == ("cat", "owl") and read_images(out).labels.tolist() == [0, 0, 1, 1]


def test_lists_of_numbers(tmp_path: Path) -> None:
    folder = images(tmp_path / "set", {"a": 4})
    vectors = [[0.5, 1.5], [0.5, 1.5], [2.0, 0.0], [0.5, 1.5]]
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"a/{i}.png", v] for i, v in enumerate(vectors)]}))
    network = trained_on(folder, tmp_path / "run")
    sampler = SeedSampler(load_network(network), num_steps=2)
    drawn = sampler.classes(range(200))
    asked = sampler.trained.inputs(drawn, torch.device("cpu"))
    assert sorted(set(map(tuple, asked.tolist()))) == [(0.5, 1.5), (2.0, 0.0)]
    assert abs(np.mean(np.array(drawn) == 0) - 0.75) < 0.1
    flags = [f"--network={network}", "--seeds=0-3", "--steps=2", "--device=cpu"]
    generate.main([*flags, f"--outdir={tmp_path}/out.zip"])
    assert set(map(tuple, read_images(tmp_path / "out.zip").vectors.tolist())) <= {(0.5, 1.5), (2.0, 0.0)}
    with pytest.raises(UserError, match="lists of numbers in place of classes"):
        generate.main([*flags, f"--outdir={tmp_path}/out", "--class=0"])


def test_equal_counts_are_drawn_as_published() -> None:
    drawn = torch.arange(3)
    assert torch.equal(Conditions(3, (5, 5, 5)).chosen(drawn), drawn) and Conditions(3, (5, 5, 5)).draws_from == 3
    assert torch.equal(Conditions(3).chosen(drawn), drawn) and Conditions(3).present == [0, 1, 2]
    assert Conditions(3, (1, 0, 2)).chosen(drawn).tolist() == [0, 2, 2] and Conditions(3, (1, 0, 2)).present == [0, 2]
    assert read_conditions({}, 3) == Conditions(3) == read_conditions({"label_counts": [1, 2]}, 3)
    assert describe_labels(np.zeros((4, 0), np.float32), 0) == {}
