"""TorchSSL.tables: every command is one that its script understands; the tables on the digits share their runs."""
from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from EDM import evaluate, fid
from shared import cli
from shared.report.tables import Job
from tests.shared.programs import ROOT
from tests.shared.small_tables import commands
from TorchSSL import tables
from TorchSSL.make_configs import LEARNERS

OPTIONS = SimpleNamespace()
ON_DIGITS = [name for name in tables.TABLES if name not in ("dpt", "digits")]


def jobs(name: str, scale: str) -> dict[str, Job]:
    return {job.name: job for job in tables.TABLES[name](scale, OPTIONS).jobs()}


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize("name", list(tables.TABLES))
def test_every_command_is_understood(name: str, scale: str) -> None:
    for job in jobs(name, scale).values():
        for script, *flags in commands(job, seed=3).values():
            if name != "dpt":
                options = importlib.import_module(f"TorchSSL.{Path(script).stem}").parse(flags)
                length = 300 if options.dataset == "digits" else 2_000_000 if options.dataset == "imagenet" else 2 ** 20
                assert options.seed == 3 and options.num_train_iter == length, job.name


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_the_fid_of_dpt_is_that_of_its_stage_2(scale: str) -> None:
    """The snapshot and the data set are those of the run's own commands, and the flags are understood."""
    stages = commands(next(iter(jobs("dpt", scale).values())), seed=3)
    script, *flags = stages["fid"]
    done = subprocess.run(["bash", *stages["stage2"], "--dry-run"], capture_output=True, text=True, check=True)
    said = {flag.partition("=")[0]: flag.partition("=")[2] for flag in flags if "=" in flag}
    assert f"--outdir={Path(said['--network']).parent} " in done.stdout
    assert scale == "tiny" or f"--data={said['--ref']} " in done.stdout
    assert Path(script) == ROOT / "EDM" / ("evaluate.py" if scale == "tiny" else "fid.py")
    given = cli.parse("", evaluate.FLAGS if scale == "tiny" else fid.CALC_FLAGS, [f for f in flags if f != "calc"])
    assert given.network == said["--network"] and (scale == "tiny" or given.seeds == list(range(50_000)))


def test_published_rows_are_whole() -> None:
    for name, printed in tables.ACCURACY.items():
        cells = tables.TABLES[name]("paper", OPTIONS).cells
        assert len(cells) == len(printed["labels"]) * (len(printed) - 1) and all(cell.printed for cell in cells)
        assert {len(numbers) for learner, numbers in printed.items() if learner != "labels"} == {6}


def test_the_digits_have_every_learner_and_the_labels_alone() -> None:
    table = tables.digits_table("paper", OPTIONS)
    rows = [cell.row for cell in table.cells]
    assert rows[0] == table.base == tables.SUPERVISED and len(rows) == len(LEARNERS) + 1
    alone, all_labels = (next(cell.job for cell in table.cells if cell.row.startswith(name))
                         for name in (tables.SUPERVISED, tables.ALL_LABELS))
    words = [commands(job)["train"] for job in (alone, all_labels)]
    assert set(words[0]) - set(words[1]) == {"--all_labels=False"} and not set(words[1]) - set(words[0])


@pytest.mark.parametrize("name", ON_DIGITS)
def test_tiny_tables_reuse_the_runs_of_the_digits(name: str) -> None:
    assert tables.TABLES[name]("tiny", OPTIONS).runs == tables.digits_table("paper", OPTIONS).runs
    known = jobs("digits", "paper")
    for job in jobs(name, "tiny").values():
        assert commands(job) == commands(known[job.name]) and job.configs == known[job.name].configs


def test_results_are_percents_by_protocol(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    accuracy = {"last": 0.5, "median_of_last_20": 0.25, "best_on_test": 0.75, "best_on_validation": None}
    (tmp_path / "run" / "result.json").write_text(json.dumps({"accuracy": accuracy, "last": {"eval/top-5-acc": 1.0}}))
    assert tables.read_accuracy(tmp_path) == {
        "accuracy": {"best on test": 75.0, "median of last 20": 25.0, "last": 50.0}, "top-5": {"last": 100.0}}


def test_results_of_dpt(tmp_path: Path) -> None:
    (tmp_path / "fid").mkdir()
    (tmp_path / "fid" / "result.json").write_text(json.dumps({"fid": 2.5}))
    accuracy = {"stage1": {"last": 0.75, "best_on_test": 0.875}, "stage3": {"last": 0.9375, "best_on_test": 1.0}}
    (tmp_path / "report.json").write_text(json.dumps({"accuracy": accuracy, "pseudo_label_accuracy": 0.5}))
    assert tables.read_dpt(tmp_path) == {
        "pseudo-label error": {"best on test": 50.0, "last": 50.0}, "FID": {"best on test": 2.5, "last": 2.5},
        "stage1 error": {"best on test": 12.5, "last": 25.0}, "stage3 error": {"best on test": 0.0, "last": 6.25}}
