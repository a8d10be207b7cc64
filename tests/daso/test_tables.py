"""DASO.tables: every command is one that main.py understands; the tables on the digits share their runs."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from DASO import tables
from DASO.lib.algorithm import ALGORITHMS
from DASO.lib.config.config import experiment_name, parse
from shared.report.tables import Job
from tests.shared.small_tables import commands

OPTIONS = SimpleNamespace(imbalance=20, args="")


def jobs(name: str, scale: str) -> dict[str, Job]:
    return {job.name: job for job in tables.BUILDERS[name](scale, OPTIONS).jobs()}


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize("name", list(tables.BUILDERS))
def test_every_command_is_understood(name: str, scale: str) -> None:
    found = jobs(name, scale)
    assert len({tuple(list(commands(job).values())[-1]) for job in found.values()}) == len(found)
    for job in found.values():
        for words in commands(job, seed=3).values():
            cfg, _ = parse(words[1:])
            length = 300 if cfg.ALGORITHM.NAME == "cRT" else 1000 if cfg.DATASET.NAME == "digits" else 250_000
            assert cfg.SEED == 3 and cfg.SOLVER.MAX_ITER == length, job.name


def test_unlabelled_images_of_another_distribution() -> None:
    found = jobs("mismatched", "paper")
    configs = {name: parse(commands(job)["train"][1:])[0] for name, job in found.items()}
    assert all(cfg.ALGORITHM.DASO.DIST_TEMP == 0.3 for name, cfg in configs.items() if "daso" in name)
    assert {(cfg.DATASET.CIFAR10.IMB_FACTOR_UL, cfg.DATASET.REVERSE_UL_DISTRIBUTION) for cfg in configs.values()
            if cfg.DATASET.NAME == "cifar10"} == {(1, False), (100, True)}
    assert all((Path(cfg.ALGORITHM.DARP.EST) / "stl10_l_150_20_ul_-1_-1_estim.npyz").is_file()
               for cfg in configs.values() if cfg.ALGORITHM.DARP.APPLY)


def test_the_digits_have_a_row_for_every_learner() -> None:
    words = [commands(job)["train"][1:] for job in jobs("digits", "paper").values()]
    assert {parse(each)[0].ALGORITHM.NAME for each in words} | {"DARP_ESTIM"} == set(ALGORITHMS)


def test_classifier_retraining_takes_the_encoder_that_was_trained_for_it() -> None:
    encoder, train = (parse(words[1:])[0] for words in
                      commands(jobs("digits", "paper")["crt_on_supervised_digits"], seed=2).values())
    assert train.ALGORITHM.CRT.TARGET_DIR == f"{encoder.OUTPUT_DIR}/{experiment_name(encoder, 2)}"


@pytest.mark.parametrize("name, columns, rows", [("cifar10-lt", 8, 11), ("cifar100-lt", 4, 10), ("stl10-lt", 4, 5)])
def test_tables_of_one_data_set(name: str, columns: int, rows: int) -> None:
    """They have every published column of it, and share the runs with the two published tables."""
    table = tables.BUILDERS[name]("paper", OPTIONS)
    whole = [tables.BUILDERS[other]("paper", OPTIONS) for other in ("matched", "mismatched")]
    assert len({cell.column for cell in table.cells}) == columns and len({cell.row for cell in table.cells}) == rows
    assert {cell.column.split()[0] for cell in table.cells} == {name.removesuffix("-lt")}
    assert {table.runs} == {other.runs for other in whole}
    printed = {(cell.row, cell.column): (cell.job.name, cell.printed) for other in whole for cell in other.cells}
    found = {name: commands(job) for other in ("matched", "mismatched") for name, job in jobs(other, "paper").items()}
    for cell in table.cells:
        assert printed[cell.row, cell.column] == (cell.job.name, cell.printed)
        assert found[cell.job.name] == commands(cell.job)


def test_no_printed_cell_is_left_out() -> None:
    cells = {name: {(cell.row, cell.column) for cell in tables.BUILDERS[name]("paper", OPTIONS).cells}
             for name in tables.TABLES}
    by_data_set = cells["cifar10-lt"] | cells["cifar100-lt"] | cells["stl10-lt"]
    assert by_data_set == cells["matched"] | cells["mismatched"] and len(by_data_set) == 10 * 8 + 5 * 8
    assert len(tables.PRINTED["matched"]) == 10 and len(tables.PRINTED["mismatched"]) == 5
    assert all(len(numbers) == 2 * len(tables.COLUMNS[name]) for name, rows in tables.PRINTED.items()
               for numbers in rows.values())


@pytest.mark.parametrize("name", list(tables.TABLES))
def test_tiny_tables_reuse_the_runs_of_the_digits(name: str) -> None:
    assert tables.BUILDERS[name]("tiny", OPTIONS).runs == tables.digits_table("paper", OPTIONS).runs
    known, shared = jobs("digits", "paper"), 0
    for job in jobs(name, "tiny").values():
        if job.name in known:
            assert commands(job) == commands(known[job.name]) and job.configs == known[job.name].configs
            shared += 1
    assert shared == (10 if "matched" in tables.TABLES[name][1] else 0)


def test_results_are_percents_by_protocol(tmp_path: Path) -> None:
    run = tmp_path / "run" / "DASO_digits_seed_0"
    run.mkdir(parents=True)
    values = {"last": 0.5, "median_of_last_20": 0.25, "best_on_test": None}
    (run / "result.json").write_text(json.dumps({"accuracy": values, "groups": {"few": values}}))
    wanted = {"median of last 20": 25.0, "last": 50.0}
    assert tables.read_accuracy(tmp_path) == {"accuracy": wanted, "few": wanted}
