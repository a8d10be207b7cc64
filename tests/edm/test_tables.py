"""EDM.tables: which runs a table needs, what is equal between the compared methods, and how results are read."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from EDM import fid, tables, train
from shared.cli import parse
from shared.report.tables import main
from tests.shared.programs import one_line_error, run
from tests.shared.small_tables import commands

OPTIONS = SimpleNamespace()


def test_both_methods_train_alike():
    table = tables.tdsm_table("tiny", OPTIONS)
    plain, aware = (commands(next(cell.job for cell in table.cells if cell.row == f"digits sym 40 %, {method}"), seed=2)
                    for method in ("EDM", "TDSM"))
    assert list(plain) == ["data", "train", "evaluate"] and list(aware) == ["data", "classifier", "train", "evaluate"]
    assert plain["data"] == aware["data"] and plain["evaluate"] == aware["evaluate"]
    assert "--noise_rate=0.4" in plain["data"] and "--seed=2" in plain["data"]
    added = set(aware["train"]) - set(plain["train"])
    assert {word.partition("=")[0] for word in added if word.startswith("--")} == {"--cls", "--noise_type",
                                                                                   "--noise_rate"}
    assert set(plain["train"]) - set(aware["train"]) == {str(tables.HERE / "train.py")}


def test_every_setting_of_the_paper_has_its_cells():
    table = tables.tdsm_table("paper", OPTIONS)
    rows = {cell.row for cell in table.cells}
    assert len(rows) == 27 and "cifar100 asym 20 %, TDSM" in rows
    printed = {(cell.row, cell.column): cell.printed.mean for cell in table.cells if cell.printed}
    assert printed["cifar10 sym 40 %, TDSM", "CW-FID"] == 15.92
    found = commands(next(cell.job for cell in table.cells if cell.row == "mnist sym 20 %, TDSM"))
    assert "--source=/data/MNIST/raw/train-images-idx3-ubyte.gz" in found["data"]
    assert "--arch=ddpmpp_mnist" in found["train"] and "--duration=200.0" in found["train"]
    assert {"--arch=ddpmpp", "--batch=1024"} <= set(found["classifier"])


@pytest.mark.parametrize("dataset", tables.TDSM_DATA)
def test_a_data_set_has_its_rows_of_the_whole_table(dataset):
    for scale, rows in (("paper", 9), ("tiny", 3)):
        table, whole = tables.TABLES[f"tdsm-{dataset}"](scale, OPTIONS), tables.tdsm_table(scale, OPTIONS)
        assert table.runs == f"tdsm-{scale}" and len({cell.row for cell in table.cells}) == rows
        found = {(cell.row, cell.column): commands(cell.job) for cell in whole.cells}
        assert all(commands(cell.job) == found[cell.row, cell.column] for cell in table.cells)
        assert scale == "tiny" or {cell.row.split()[0] for cell in table.cells} == {dataset}


def test_images_of_64_pixels_are_made_and_scored_as_published():
    cells = tables.TABLES["edm-64"]("paper", OPTIONS).cells
    assert {(cell.row, cell.column): cell.printed.mean for cell in cells} == {
        ("FFHQ", "ddpmpp"): 2.39, ("FFHQ", "ncsnpp"): 2.53, ("AFHQv2", "ddpmpp"): 1.96, ("AFHQv2", "ncsnpp"): 2.16,
        ("ImageNet", "adm"): 1.36}
    found = {cell.row: commands(cell.job) for cell in cells}
    assert all(list(stages) == ["train", "score0", "score1", "score2"] for stages in found.values())
    assert {"--data=/data/afhqv2-64x64.zip", "--dropout=0.25", "--batch=256", "--duration=200.0"} <= set(
        found["AFHQv2"]["train"])
    assert {"--duration=2500.0", "--batch=4096", "--fp16=1"} <= set(found["ImageNet"]["train"])
    assert {"--steps=256", "--S_churn=40", "--ref=/data/imagenet-64x64.zip"} <= set(found["ImageNet"]["score2"])
    assert "--steps=40" in found["FFHQ"]["score0"]
    for stages in found.values():
        parse("", train.FLAGS, stages["train"][1:])
        assert parse("", fid.CALC_FLAGS, stages["score1"][2:]).seeds == list(range(50_000, 100_000))


def test_results_are_read_in_the_units_of_the_table(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "result.json").write_text(
        json.dumps({"fd_judge": 3.5, "class_accuracy": 0.875, "cas": 0.5, "coverage": 0.25}))
    assert tables.read_evaluation(tmp_path) == {
        "FID": {"last snapshot": 3.5}, "class accuracy": {"last snapshot": 87.5}, "CAS": {"last snapshot": 50.0},
        "coverage": {"last snapshot": 25.0}}
    job = tables.edm_table("tiny", OPTIONS).cells[0].job
    for number, value in enumerate((3.0, 2.0, 4.0)):
        (tmp_path / f"range{number}").mkdir()
        (tmp_path / f"range{number}" / "result.json").write_text(json.dumps({"fd_judge": value}))
    assert job.read(tmp_path) == {"FID": {"lowest of three": 2.0, "first": 3.0}}


def test_the_list_of_runs(tmp_path, capsys):
    main("EDM.tables", tables.TABLES, argv=["tdsm", "--scale=tiny", "--list", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    assert said.count("not run") == 9 and "digits_sym_40_tdsm/seed_2: not run" in said


def test_an_unknown_table_is_one_line():
    assert 'did you mean "tdsm"' in one_line_error(run("EDM/tables.py", "tdsn", status=2))
    assert 'did you mean "tdsm-cifar10"' in one_line_error(run("EDM/tables.py", "cifar10", status=2))


@pytest.mark.parametrize("name", list(tables.TABLES))
def test_names_of_runs_differ(name):
    for scale in ("paper", "tiny"):
        jobs = tables.TABLES[name](scale, OPTIONS).jobs()
        assert len({job.name for job in jobs}) == len(jobs)
