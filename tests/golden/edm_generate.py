"""generate.py and generate.sh end to end on the CPU, per-seed draws, seed lists and the split into batches."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import EDM
from EDM.generate import main
from EDM.training.networks import PRECONDITIONERS
from EDM.training.published import cache_prefix
from EDM.training.snapshots import save_snapshot
from shared.option_types import parse_int_list
from shared.training.randomness import SeedGenerators, split_batches
from tests.golden.cases import arrays, each, fill, number, serves, stored, whole
from tests.golden.edm_cases import PAPER, cases, json_facts, whole_facts

RNG, END_TO_END = cases(kind="rng"), cases(kind="end to end")
SERVES = serves(RNG, END_TO_END)
LISTS, SPLITS, URLS = json_facts("parse_int_list"), json_facts("batch_split"), json_facts("download_cache_prefix")
SCRIPTS = [value for _, value in sorted(whole_facts("generate_sh").items())]
# A network of any kind makes the files of generate.sh.
SMALL = {"preconditioner": "EDMPrecond", "img_resolution": 8, "img_channels": 3, "model_type": "SongUNet",
         "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def snapshot_of(network: dict, path: Path) -> Path:
    arguments = dict(network)
    kind = PRECONDITIONERS[arguments.pop("preconditioner")]
    save_snapshot(path, fill(kind(**arguments)).eval())
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@each(RNG)
def test_draws_of_a_seed(case: dict) -> None:
    given = stored(PAPER, case)
    generators = SeedGenerators(given["seeds"].tolist())
    shape = given["latents"].shape[1:]
    assert np.array_equal(generators.normal(shape).numpy(), given["latents"])
    if "class_idx" in given:
        assert np.array_equal(generators.integers(classes_of(case)).numpy(), given["class_idx"])
    noises = [name for name in given if re.fullmatch(r"noise\d+", name)]
    for name in sorted(noises, key=lambda name: int(name.removeprefix("noise"))):
        assert np.array_equal(generators.normal(shape, torch.float64).numpy(), given[name])
    assert given.keys() <= {"seeds", "latents", "class_idx", *noises}


def classes_of(case: dict) -> int:
    """Return the number of classes that the case draws one of: a field of its own, or told in its description."""
    for name in ("num_classes", "classes", "label_dim"):
        if name in case:
            return case[name]
    return whole(case["description"], "integer below #")


@each(END_TO_END)
def test_generated_images(case: dict, tmp_path: Path) -> None:
    network = snapshot_of(case["network"], tmp_path / "network-snapshot-000000.pkl")
    levels = number(case["tolerance"], "at most # grey", 1)
    share = number(case["tolerance"], "at most #%", 1) / 100
    for name, run in case["runs"].items():
        outdir = tmp_path / name
        main([f"--network={network}", f"--outdir={outdir}", "--device=cpu", *run["args"]])
        assert sorted(str(path.relative_to(outdir)) for path in outdir.rglob("*.png")) == sorted(run["files"])
        made = np.stack([pixels(outdir / file) for file in sorted(run["files"])]).astype(int)
        difference = np.abs(made - arrays(PAPER, case["file"])[name])
        assert difference.max() <= levels and (difference > 0).mean() <= share, name


@pytest.mark.parametrize(("text", "expected"), LISTS)
def test_seed_list(text: str, expected: list[int] | str) -> None:
    if expected == "ValueError":
        with pytest.raises(ValueError):
            parse_int_list(text)
    else:
        assert parse_int_list(text) == expected


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: f"{s['seeds']}-{s['max_batch']}-{s['ranks']}")
def test_batches_of_each_rank(split: dict) -> None:
    parts = split_batches(range(split["seeds"]), split["max_batch"], split["ranks"])
    assert [seed for part in parts for seed in part] == list(range(split["seeds"]))
    for rank, expected in enumerate(split["per_rank"]):
        own = parts[rank::split["ranks"]]
        lengths = [len(part) for part in own]
        assert len(own) == expected["batches"] and sum(lengths) == expected["total"]
        assert lengths[:len(expected["first_lengths"])] == expected["first_lengths"]
        assert lengths[-1:] == [expected["last_length"]][:len(lengths)]


@pytest.mark.parametrize(("url", "prefix"), URLS)
def test_cache_prefix(url: str, prefix: str) -> None:
    assert cache_prefix(url) == prefix


@pytest.mark.parametrize("given", SCRIPTS, ids=lambda given: "-".join(given["arguments"]))
def test_generate_sh(given: dict, tmp_path: Path) -> None:
    (num, save_dir, model, processes), runs = given["arguments"], given["runs"]
    snapshot_of({**SMALL, "label_dim": len(runs)}, tmp_path / model)
    script = Path(EDM.__file__).parent / "generate.sh"
    done = subprocess.run(["bash", str(script), num, save_dir, model, processes, "--device=cpu"], cwd=tmp_path,
                          env={**os.environ, "PYTHON": sys.executable},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(run["nproc_per_node"] == int(processes) for run in runs) and f"{processes} process(es)" in done.stdout
    for run in runs:
        files = sorted((tmp_path / run["outdir"]).glob("*.png"))
        assert len(files) == run["images"] == len(parse_int_list(run["seeds"]))
        assert [str(files[i].relative_to(tmp_path)) for i in (0, -1)] == [run["first"], run["last"]]
    assert {path.name for path in (tmp_path / save_dir).iterdir()} == {str(run["class_idx"]) for run in runs}

    last = runs[-1]  # one run a class, as published, gives the same files
    main([f"--outdir={tmp_path / 'single'}", f"--seeds={last['seeds']}", f"--class={last['class_idx']}",
               f"--network={tmp_path / last['network']}", "--device=cpu"])
    for path in (tmp_path / "single").glob("*.png"):
        assert np.array_equal(pixels(path), pixels(tmp_path / last["outdir"] / path.name))
