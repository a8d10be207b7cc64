"""MetaSemi.tables and the Dockerfile: which runs a table needs, how results are read, which versions are installed."""
from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from MetaSemi import tables, train_baseline, train_meta
from shared.report.tables import Cell, main
from tests.shared.programs import ROOT
from tests.shared.small_tables import commands

OPTIONS = SimpleNamespace(gpu=False, gpus="", processes="4")
SCRIPTS = {"train_meta.py": train_meta, "train_baseline.py": train_baseline}


def words(cell: Cell, seed: int = 0) -> list[str]:
    return commands(cell.job, seed)["train"]


def test_published_commands() -> None:
    """The row of MetaSemi is the README's commands, its first seed the published one."""
    cells = {cell.column.partition(",")[0]: cell for cell in tables.ablation_table("paper", OPTIONS).cells
             if cell.row == "MetaSemi (both)"}
    for dataset, flags in {
            "svhn": "--num-label 1000 --alpha 0.1 --weight-decay 5e-5 --seed 7788",
            "cifar10": "--num-label 4000 --alpha 1.0 --weight-decay 1e-4 --seed 8469",
            "cifar100": "--num-label 10000 --alpha 1.0 --weight-decay 1e-4 --seed 7788"}.items():
        script, *ours = words(cells[dataset])
        found = train_meta.parse(ours)
        wanted = train_meta.parse(["--dataset", dataset, "--mix-up", *flags.split(), "--save-path", "/out/run",
                                   "--data-path", "/data"])
        assert Path(script).name == "train_meta.py" and vars(found) == vars(wanted)
        assert train_meta.parse(words(cells[dataset], seed=2)[1:]).seed == wanted.seed + 2


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_every_command_of_the_ablation_is_right(scale: str) -> None:
    for cell in tables.ablation_table(scale, OPTIONS).cells:
        script, *flags = words(cell, 1)
        options = SCRIPTS[Path(script).name].parse(flags)
        assert options.mix_up == (cell.row in ("mix-up only", "MetaSemi (both)", "both, uncorrected"))
        assert (Path(script).name == "train_meta.py") == (cell.row not in ("labels only", "mix-up only", "all labels"))
        if Path(script).name == "train_meta.py":
            assert options.meta_lr == (0 if "uncorrected" in cell.row else 1)
        assert options.total_steps == (400_000 if scale == "paper" else 600)


def test_all_methods_on_the_digits_train_alike() -> None:
    cells = [cell for cell in tables.ablation_table("tiny", OPTIONS).cells if "20" in cell.column]
    assert [cell.row for cell in cells] == ["labels only", "meta only", "mix-up only", "MetaSemi (both)",
                                            "meta only, uncorrected", "both, uncorrected"]
    flags = [set(words(cell)[1:]) - {"--mix-up", "--meta-lr=0"} for cell in cells]
    assert all(other == flags[0] for other in flags)


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize("name", list(tables.SETTINGS))
def test_a_data_set_has_its_column_of_the_ablation(name: str, scale: str) -> None:
    table, whole = tables.TABLES[name](scale, OPTIONS), tables.ablation_table(scale, OPTIONS)
    assert table.runs == f"ablation-{scale}" and table.name == name
    assert [(cell.row, cell.column, cell.job.name, words(cell)) for cell in table.cells] == [
        (cell.row, cell.column, cell.job.name, words(cell)) for cell in whole.cells
        if scale == "tiny" or cell.column.startswith(f"{name},")]
    assert len(table.cells) == (12 if scale == "tiny" else 5)


def test_imagenet_keeps_the_global_batch() -> None:
    cells = tables.imagenet_table("paper", OPTIONS).cells
    assert {(cell.row, cell.column): cell.printed.mean for cell in cells} == {
        ("labels only", "top-1"): 53.65, ("labels only", "top-5"): 31.01, ("MetaSemi", "top-1"): 44.87,
        ("MetaSemi", "top-5"): 18.88}
    command = words(cells[-1])
    assert "--nproc_per_node=4" in command and "--batch-size=128" in command
    alone = SimpleNamespace(**{**vars(OPTIONS), "processes": "1"})
    command = words(tables.imagenet_table("paper", alone).cells[-1])
    assert Path(command[0]).name == "train_meta_imagenet.py" and "--batch-size=512" in command


def test_results_become_error_rates(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    accuracy = {"last": 0.9, "median_of_last_20": 0.875, "best_on_test": 0.925}
    (tmp_path / "run" / "result.json").write_text(json.dumps({"accuracy": accuracy}))
    found = tables.read_error(tmp_path)
    assert found == {"error": {"last": pytest.approx(10), "median of last 20": pytest.approx(12.5),
                               "best on test": pytest.approx(7.5)}}


def test_table_on_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The whole machinery, with a training of a few steps."""
    monkeypatch.setattr(tables, "DIGITS_LENGTH", "--total-steps=4")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    argv = ["ablation", "--scale=tiny", "--seeds=1", "--only=metasemi", f"--out={tmp_path}"]
    main("MetaSemi.tables", tables.TABLES, tables.MORE_FLAGS, argv)
    assert "MetaSemi (both)" in capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "ablation-tiny").glob("table.*")} >= {".md", ".csv", ".json", ".png"}


def dockerfile() -> dict[str, list[str]]:
    """Return instruction -> what follows it, of each line in order."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "MetaSemi" / "Docker" / "Dockerfile").read_text())
    found: dict[str, list[str]] = {}
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        word, _, rest = line.partition(" ")
        found.setdefault(word, []).append(rest)
    return found


def test_docker_image_has_the_tested_versions() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.replace('"', "'") for line in lines if line and not line.startswith("#")]
    install = next(line for line in dockerfile()["RUN"] if " pip install " in line).partition("--no-cache-dir ")[2]
    assert [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', install)] == wanted


def test_docker_image_finds_the_project() -> None:
    """It needs no file of the build's folder; where the README mounts the project, its programs look for it."""
    image = dockerfile()
    assert set(image) == {"FROM", "ENV", "RUN", "USER", "WORKDIR", "ENTRYPOINT"}
    mount = re.search(r'-v "\$PWD/\.\./\.\.":(\S+)', (ROOT / "MetaSemi" / "README.md").read_text())[1]
    assert f"PYTHONPATH={mount}" in image["ENV"][0].split()
    folder, = image["WORKDIR"]
    assert (ROOT / Path(folder).relative_to(mount) / "train_meta.py").is_file()
    assert image["USER"][0] in image["RUN"][-1] and "useradd" in image["RUN"][-1]
    assert json.loads(image["ENTRYPOINT"][0])[0] == "sh"
    least = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    python = re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", image["FROM"][0])
    assert [int(part) for part in python.groups()] >= [int(part) for part in least.groups()]
