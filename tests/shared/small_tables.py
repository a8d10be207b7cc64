"""A paper of two methods whose runs take a moment, for shared/report/tables.py: `python -m tests.shared.small_tables`.

A run writes its value, seed + its method's number, and a line into calls.txt for every stage that was really computed.
"""
from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from shared.report.tables import Cell, Job, Printed, Stage, Table, Task, serve

METHODS = {"plain": 1.0, "better": 2.0}


def commands(job: Job, seed: int = 0) -> dict[str, list[str]]:
    """Return the words of every stage of a job, run in /out with the data sets in /data."""
    task = Task(job, seed, Path("/out"), Path("/data"))
    return {stage.name: task.words(stage) for stage in job.stages}


def read(folder: Path) -> dict[str, dict[str, float]]:
    value = json.loads((folder / "value.json").read_text())
    return {"accuracy": {"last": value, "best": value + 0.5}}


def table(scale: str, options: SimpleNamespace) -> Table:
    def job(method: str, value: float) -> Job:
        further = os.environ.get("SMALL_TABLES_FLAGS", "").split()
        return Job(method, tuple(Stage(name, ("-m", "tests.shared.small_stage", name, "{out}", method,
                                              str(value), "{seed}", *further)) for name in ("first", "second")), read)

    cells = tuple(Cell(method, "digits", job(method, value), "accuracy", Printed(value + 1, 0.5))
                  for method, value in METHODS.items())
    return Table("small", "A small table", "nowhere", "Accuracy in %", cells, ("last", "best"))


def again(scale: str, options: SimpleNamespace) -> Table:
    """Return a table that shows the same runs, compared with a row."""
    return replace(table(scale, options).view("again", "The same", scale, lambda cell: True), base="plain")


def part(scale: str, options: SimpleNamespace) -> Table:
    """Return a table that shows some of the runs."""
    return table(scale, options).view("part", "A part", scale, lambda cell: cell.row == "better")


if __name__ == "__main__":
    serve("tests.shared.small_tables", {"small": table, "again": again, "part": part})
