"""The tables: every command is one that its script understands, and results are read as they are written."""
from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from DDAE.tables import DIGITS_CHAIN, HERE, PRINTED, TABLES
from shared.report.tables import Job
from tests.shared.small_tables import commands

OPTIONS = SimpleNamespace()


def jobs() -> list:
    return [pytest.param(job, id=f"{name}-{scale}-{job.name}") for name, make in TABLES.items()
            for scale in ("paper", "tiny") for job in make(scale, OPTIONS).jobs()]


@pytest.mark.parametrize("job", jobs())
def test_every_command_is_understood(job: Job) -> None:
    for script, *flags in commands(job, seed=1).values():
        module = importlib.import_module("DDAE." + ".".join(Path(script).relative_to(HERE).with_suffix("").parts))
        module.parse(flags)


def test_the_printed_table_is_whole() -> None:
    table = TABLES["cifar10"]("paper", OPTIONS)
    printed = {(cell.row, cell.column): cell.printed.mean for cell in table.cells}
    assert printed["EDM_ddpmpp_aug", "best FID: FID"] == 2.12 and printed["DDPM_ddpm", "best probe: acc"] == 90.05
    assert len(printed) == 2 * sum(map(len, PRINTED.values())) == 18


def test_results_are_read(tmp_path: Path) -> None:
    job = next(job for job in TABLES["cifar10"]("tiny", OPTIONS).jobs() if job.name == "chain")
    for folder in DIGITS_CHAIN.values():
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "result.json").write_text(json.dumps({"accuracy": {"last": 0.5, "best_on_test": 0.75}}))
    values = job.read(tmp_path)
    assert values and all(row == {"last": 50.0, "best on test": 75.0} for row in values.values())
