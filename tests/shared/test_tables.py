"""Tables of papers: run, continue, share a folder, refuse what does not belong, aggregate right."""
from __future__ import annotations

import csv
import importlib
import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.report.table_report import anchor, compare, deviations_from_print, difference, mean, std
from tests.shared.programs import ROOT, one_line_error, run, start, wait_until

SCRIPT = "tests/shared/small_tables.py"
PROGRAM = (SCRIPT, "small")


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_a_table_from_nothing_and_again(tmp_path: Path) -> None:
    run(*PROGRAM, f"--out={tmp_path}", "--jobs=2")
    folder = tmp_path / "small-paper"
    content = json.loads((folder / "table.json").read_text())
    plain, better = content["cells"]
    assert plain["protocols"]["last"] == {"mean": 2.0, "std": 1.0, "values": [1.0, 2.0, 3.0]}
    assert better["protocols"]["best"]["mean"] == 3.5 and better["deviations"] == 0.0
    text = (folder / "table.md").read_text()
    assert "2.00 ± 1.00 (printed 2.00 ± 0.50; +0.0 sd) [3](#plain-digits)" in text
    for cell in content["cells"]:
        for found in cell["runs"]:
            assert found["commit"] and found["hardware"]["hardware"]
            assert all((folder / found["folder"] / name).is_file() for name in ("run.json", *found["logs"]))
            assert f"({found['folder']}/run.json)" in text
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    before = calls(tmp_path)
    assert len(before) == len(set(before)) == 12  # two methods, three seeds, two stages
    again = run(*PROGRAM, f"--out={tmp_path}")
    assert calls(tmp_path) == before
    assert "started" not in again.stdout


def test_tables_that_share_their_runs(tmp_path: Path) -> None:
    for name in ("small", "again"):
        done = run(SCRIPT, name, f"--out={tmp_path}", "--seeds=2")
    assert len(calls(tmp_path)) == 8
    text = (tmp_path / "again-paper" / "table.md").read_text()
    assert "(../small-paper/plain/seed_0/run.json)" in text and "| plain | 1.50 ± 0.71 (printed" in text
    # One of them compares with a row, seed by seed.
    assert "| minus plain |" in done.stdout and "| +1.00 (2 of 2) |" in done.stdout


def test_a_part_of_a_table_leaves_its_runs_to_the_whole(tmp_path: Path) -> None:
    done = run(SCRIPT, "part", f"--out={tmp_path}", "--seeds=1")
    assert "| better | 2.00 (printed" in done.stdout and "plain" not in done.stdout
    assert calls(tmp_path) == ["first better seed_0", "second better seed_0"]
    run(SCRIPT, "small", f"--out={tmp_path}", "--seeds=1")
    assert calls(tmp_path)[2:] == ["first plain seed_0", "second plain seed_0"]


def test_more_seeds_than_the_paper_has(tmp_path: Path) -> None:
    run(*PROGRAM, f"--out={tmp_path}", "--seeds=5", "--only=plain")
    content = json.loads((tmp_path / "small-paper" / "table.json").read_text())
    assert [found["seed"] for found in content["cells"][0]["runs"]] == [0, 1, 2, 3, 4]


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    done = run(*PROGRAM, f"--out={tmp_path}", "--seeds=1", "--only=better")
    with open(tmp_path / "small-paper" / "table.csv", newline="") as file:
        rows = {(row["row"], row["protocol"]): row for row in csv.DictReader(file)}
    assert rows["plain", "last"]["mean"] == "not run" and rows["plain", "last"]["runs"] == "0"
    assert rows["better", "last"]["mean"] == "2.0" and rows["better", "last"]["std"] == ""
    assert rows["better", "last"]["deviations"] == "-2.0"  # (2 - 3) / 0.5, the printed deviation
    assert "| plain | not run (printed 2.00 ± 0.50) |" in done.stdout


def test_killed_and_started_again(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    process = start(*PROGRAM, f"--out={tmp_path}", "--seeds=1", "--only=plain")
    wait_until(lambda: calls(tmp_path) == ["first plain seed_0"], process)
    record = tmp_path / "small-paper" / "plain" / "seed_0" / "run.json"
    wait_until(lambda: "first" in json.loads(record.read_text()).get("stages", {}), process)
    listing = (*PROGRAM, f"--out={tmp_path}", "--list", "--seeds=1", "--only=plain")
    assert "plain/seed_0: running" in run(*listing).stdout
    process.kill()
    process.wait()
    (tmp_path / "slow").unlink()
    # Once the child that was left over has ended.
    wait_until(lambda: "plain/seed_0: interrupted" in run(*listing).stdout)
    run(*PROGRAM, f"--out={tmp_path}", "--seeds=1", "--only=plain")
    # The first stage is not repeated; the second may have been finished by the child that was left over.
    assert calls(tmp_path).count("first plain seed_0") == 1
    assert json.loads(record.read_text())["state"] == "finished"
    assert "since the last of 1 interruptions (begun at commit" in (tmp_path / "small-paper" / "table.md").read_text()


def test_two_at_once(tmp_path: Path) -> None:
    both = [start(*PROGRAM, f"--out={tmp_path}") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 12
    assert all("2.00 ± 1.00" in out for out, _ in outputs)


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    arguments = (*PROGRAM, f"--out={tmp_path}", "--seeds=1")
    run(*arguments)
    before = (tmp_path / "small-paper" / "table.json").read_text()
    refused = run(*arguments, SMALL_TABLES_FLAGS="--lr=1", status=2)
    assert "other commands" in one_line_error(refused)
    assert (tmp_path / "small-paper" / "table.json").read_text() == before
    # Nor does a folder count that no table made.
    foreign = tmp_path / "b" / "small-paper" / "plain" / "seed_0"
    foreign.mkdir(parents=True)
    (foreign / "value.json").write_text("99")
    refused = run(*PROGRAM, f"--out={tmp_path / 'b'}", status=2)
    assert "no run.json" in one_line_error(refused)


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "fail-plain").touch()
    done = run(*PROGRAM, f"--out={tmp_path}", "--seeds=1", status=2)
    assert "asked to fail" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: 1 of 2 runs failed")
    assert "| plain | not run (printed" in done.stdout and "| better | 2.00 (printed" in done.stdout
    (tmp_path / "fail-plain").unlink()
    assert "| plain | 1.00 (printed" in run(*PROGRAM, f"--out={tmp_path}", "--seeds=1").stdout


def test_a_run_without_a_result_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "lose-plain").touch()
    done = run(*PROGRAM, f"--out={tmp_path}", "--seeds=1", status=2)
    assert "plain/seed_0: its result cannot be read, FileNotFoundError" in done.stderr
    assert "Traceback" not in done.stderr and "| better | 2.00 (printed" in done.stdout


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Environment in which SLURM's programs are there."""
    for name in ("sbatch", "srun", "sacct", "scontrol"):
        place = tmp_path / "bin" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/shared/fake_slurm.py {name} "$@"\n')
        place.chmod(0o755)
    (tmp_path / "slurm").mkdir()
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path / "slurm")}


def test_jobs_of_slurm(tmp_path: Path, slurm: dict[str, str]) -> None:
    """Every run is a job, whose script says what was asked for; one that the time limit ends goes on by itself."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "slow").touch()
    process = start(*PROGRAM, f"--out={out}", "--seeds=1", "--slurm=main", "--slurm-hours=3",
                    "--slurm-gpus=2", "--slurm-args=account=us cpus-per-task=8", **slurm)
    record = out / "small-paper" / "plain" / "seed_0" / "run.json"
    wait_until(lambda: record.exists() and "first" in json.loads(record.read_text()).get("stages", {}), process)
    script = (tmp_path / "slurm" / "1.sh").read_text().splitlines()
    assert {"#SBATCH --partition=main", "#SBATCH --time=180", "#SBATCH --gpus-per-node=2", "#SBATCH --account=us",
            "#SBATCH --cpus-per-task=8", "#SBATCH --job-name=fewlabel"} <= set(script)
    os.killpg(int((tmp_path / "slurm" / "1.step").read_text()), signal.SIGUSR2)  # as SLURM does, near the end
    wait_until(lambda: len(list((out / "slurm").glob("1_0_log.out"))) and "Requeued job 1" in "".join(
        path.read_text() for path in (out / "slurm").glob("1_0_log.*")))
    (out / "slow").unlink()
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "| plain | 1.00 (printed" in said and "| better | 2.00 (printed" in said
    assert calls(out).count("first plain seed_0") == 1 and json.loads(record.read_text())["state"] == "finished"


def test_a_job_that_fails_is_named(tmp_path: Path, slurm: dict[str, str]) -> None:
    (tmp_path / "fail-plain").touch()
    done = run(*PROGRAM, f"--out={tmp_path}", "--seeds=1", "--slurm=main", status=2, **slurm)
    assert "1 of 2 runs failed" in done.stderr and "plain/seed_0" in done.stderr


def test_without_slurm(tmp_path: Path) -> None:
    assert "srun" in one_line_error(run(*PROGRAM, f"--out={tmp_path}", "--slurm=main", status=2))


def test_list_runs_nothing(tmp_path: Path) -> None:
    done = run(*PROGRAM, f"--out={tmp_path}", "--list")
    assert done.stdout.count("not run") == 6 and not calls(tmp_path)


@pytest.mark.parametrize("arguments, words", [
    (["smal"], 'did you mean "small"'), (["small", "--only=zebra"], "rows: plain, better"),
    (["small", "--seeds=0"], "x>=1"), (["small", "--run=plain/seed_9"], "no such run")])
def test_bad_input(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in one_line_error(run(SCRIPT, *arguments, f"--out={tmp_path}", status=2))


numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(st.none() | numbers, max_size=12))
def test_mean_and_deviation(values: list[float | None]) -> None:
    known = np.array([value for value in values if value is not None], np.float64)
    assert (mean(values) is None) == (len(known) == 0)
    assert (std(values) is None) == (len(known) < 2)  # one seed has no deviation, not one of zero
    if len(known):
        assert mean(values) == pytest.approx(known.mean(), rel=1e-9, abs=1e-6)
    if len(known) > 1:
        assert std(values) == pytest.approx(known.std(ddof=1), rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12))
def test_paired_difference(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    found = difference(list(a), list(b))
    assert found["mean"] == pytest.approx((a - b).mean(), rel=1e-9, abs=1e-6)
    assert found["standard_error"] == pytest.approx((a - b).std(ddof=1) / math.sqrt(len(a)), rel=1e-6, abs=1e-6)
    assert found["positive"] == (a > b).sum()


@given(st.dictionaries(st.integers(0, 6), numbers), st.dictionaries(st.integers(0, 6), numbers))
def test_rows_are_compared_seed_by_seed(a: dict[int, float], b: dict[int, float]) -> None:
    """Seeds that only one of the two rows has do not count; the order in which runs stand does not either."""
    cells = [{"row": row, "column": "c", "over_base": None, "runs": [{"seed": seed} for seed in values],
              "protocols": {"last": {"values": list(values.values())}} if values else {}}
             for row, values in (("a", a), ("b", b))]
    compare(cells, "b", "last")
    both = sorted(a.keys() & b.keys())
    found = cells[0]["over_base"]
    assert cells[1]["over_base"] is None and (found is None) == (not both)
    if both:
        pairs = np.array([[a[seed], b[seed]] for seed in both])
        assert found["mean"] == pytest.approx((pairs[:, 0] - pairs[:, 1]).mean(), rel=1e-9, abs=1e-6)
        assert found["seeds"] == len(both) and found["positive"] == (pairs[:, 0] > pairs[:, 1]).sum()


@pytest.mark.parametrize("paper", ["DASO", "DDAE", "EDM", "MetaSemi", "TorchSSL"])
def test_every_cell_links_to_its_own_evidence(paper: str) -> None:
    module = importlib.import_module(f"{paper}.tables")
    options = SimpleNamespace(data_dir=Path("/data"), imbalance=20, args="", gpu=False, gpus="", processes=1)
    for make in getattr(module, "BUILDERS", module.TABLES).values():
        for scale in ("paper", "tiny"):
            cells = make(scale, options).cells
            assert len({anchor(vars(cell)) for cell in cells}) == len({(cell.row, cell.column) for cell in cells}) \
                == len(cells)


@pytest.mark.parametrize("measured, printed, expected", [
    ((95.0, 0.5), (94.0, 0.25), 4.0), ((95.0, 0.5), (94.0, None), 2.0), ((95.0, None), (94.0, None), None),
    ((95.0, 0.0), (94.0, None), None), ((None, None), (94.0, 0.1), None)])
def test_deviations_from_print(measured, printed, expected) -> None:
    assert deviations_from_print(*measured, *printed) == expected
