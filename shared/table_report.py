"""What a table of shared/tables.py leaves: table.md, table.csv, table.json and table.png beside its runs."""
from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.aggregate import deviation, deviations_from_print, mean
from shared.cli import UserError
from shared.files import atomic
from shared.hardware import machine
from shared.table_runs import Cell, Table, Task

TINY = ("Made at `--scale tiny`: the digits, tiny networks and short runs. It shows that every command of the table "
        "works; its numbers say nothing about those of the paper.")


def runs_of(cell: Cell, folder: Path, seeds: Sequence[int],
            data_dir: Path) -> Iterator[tuple[int, Path, dict[str, Any]]]:
    """Yield (seed, folder, run.json) of the finished runs of a cell; one of another configuration raises UserError."""
    for seed in seeds:
        task = Task(cell.job, seed, folder / cell.job.name / f"seed_{seed}", data_dir)
        if task.finished():
            yield seed, task.folder, task.record()


def measure(cell: Cell, table: Table, scale: str, folder: Path, seeds: Sequence[int], data_dir: Path) -> dict[str, Any]:
    """Return the numbers of one cell under each protocol, and the evidence for them."""
    runs = list(runs_of(cell, folder, seeds, data_dir))
    content: dict[str, Any] = {
        "row": cell.row, "column": cell.column, "metric": cell.metric, "protocols": {},
        "printed": None if cell.printed is None or scale != "paper" else vars(cell.printed),
        "runs": [{"seed": seed, "folder": str(path.relative_to(folder)), "commit": run["commit"],
                  "hardware": run["hardware"], "seconds": sum(run["stages"].values()),
                  "logs": [f"{name}.log" for name in run["stages"]], "configs": [str(c.name) for c in cell.job.configs]}
                 for seed, path, run in runs]}
    for _, path, run in runs:
        if cell.metric not in run["result"]:
            raise UserError(f"{path / 'run.json'} has no {cell.metric}; it has {', '.join(run['result'])}")
    for protocol in table.protocols:
        values = [run["result"][cell.metric].get(protocol) for _, _, run in runs]
        if mean(values) is not None:
            content["protocols"][protocol] = {"mean": mean(values), "std": deviation(values), "values": values}
    printed, found = content["printed"], content["protocols"].get(table.protocols[0])
    content["deviations"] = None if printed is None or found is None else deviations_from_print(
        found["mean"], found["std"], printed["mean"], printed["std"])
    return content


def number(mean_: float, std: float | None) -> str:
    """Return "95.03 ± 0.06", without the second part where there is no deviation."""
    return f"{mean_:.2f}" if std is None else f"{mean_:.2f} ± {std:.2f}"


def cell_text(cell: Mapping[str, Any], protocol: str) -> str:
    """Return what stands in the Markdown table: measured, printed, and how far they are apart."""
    found = cell["protocols"].get(protocol)
    parts = [number(found["mean"], found["std"]) if found else "not run"]
    if cell["printed"] is not None:
        apart = "" if cell["deviations"] is None else f"; {cell['deviations']:+.1f} sd"
        parts.append(f"(printed {number(cell['printed']['mean'], cell['printed']['std'])}{apart})")
    if cell["runs"]:
        parts.append(f"[{len(cell['runs'])}](#{anchor(cell)})")
    return " ".join(parts)


def anchor(cell: Mapping[str, Any]) -> str:
    """Return the Markdown anchor of the evidence of a cell."""
    text = f"{cell['row']} {cell['column']}".lower()
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text).split())


def grid(cells: Sequence[Mapping[str, Any]], text: Any, corner: str) -> list[str]:
    """Return a Markdown table of the cells."""
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    by_place = {(cell["row"], cell["column"]): cell for cell in cells}
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row in rows:
        places = [by_place.get((row, column)) for column in columns]
        lines.append(f"| {row} | {' | '.join('' if cell is None else text(cell) for cell in places)} |")
    return lines


def markdown(content: Mapping[str, Any]) -> str:
    """Return table.md."""
    cells, protocols = content["cells"], content["protocols"]
    lines = [f"# {content['title']}", "", f"{content['unit']}, {protocols[0]}; mean ± standard deviation over seeds "
             f"{', '.join(map(str, content['seeds']))}. Printed numbers: {content['source']}; sd: standard deviations "
             "between print and here. The linked number counts the runs behind a cell.", ""]
    lines += [TINY, ""] * (content["scale"] == "tiny") + [content["note"], ""] * bool(content["note"])
    lines += grid(cells, lambda cell: cell_text(cell, protocols[0]), "")
    for protocol in protocols[1:]:
        if any(protocol in cell["protocols"] for cell in cells):
            lines += ["", f"By another protocol, {protocol}:", ""]
            lines += grid(cells, lambda cell, name=protocol: "not run" if name not in cell["protocols"] else number(
                cell["protocols"][name]["mean"], cell["protocols"][name]["std"]), "")
    lines += ["", "## Runs", ""]
    for cell in cells:
        if cell["runs"]:
            lines += [f"### {cell['row']}, {cell['column']}", f'<a id="{anchor(cell)}"></a>', ""]
            for run in cell["runs"]:
                logs = ", ".join(f"[{log}]({run['folder']}/{log})" for log in run["logs"])
                configs = ", ".join(run["configs"]) or "all on the command line"
                lines.append(f"- seed {run['seed']}: [run.json]({run['folder']}/run.json), configuration {configs}, "
                             f"commit {run['commit']}, {run['seconds']:.0f} s on {run['hardware']['hardware']} "
                             f"({run['hardware']['cores']} cores, torch {run['hardware']['torch']}); {logs}")
            lines.append("")
    return "\n".join(lines)


def write_csv(content: Mapping[str, Any], path: Path) -> None:
    """Write one line per cell and protocol."""
    with atomic(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "column", "protocol", "mean", "std", "runs", "printed", "printed_std", "deviations"])
        for cell in content["cells"]:
            printed = cell["printed"] or {"mean": "", "std": ""}
            for i, protocol in enumerate(content["protocols"]):
                found = cell["protocols"].get(protocol, {"mean": "not run", "std": "", "values": ()})
                first = i == 0
                writer.writerow([cell["row"], cell["column"], protocol, found["mean"],
                                 "" if found["std"] is None else found["std"], len(found["values"]),
                                 printed["mean"] if first else "",
                                 "" if not first or printed["std"] is None else printed["std"],
                                 "" if not first or cell["deviations"] is None else cell["deviations"]])


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Write a panel per column: what is measured (dots) beside what is printed (open squares), with deviations."""
    from shared.plots import dots

    panels: dict[str, dict[str, list[tuple[float, float | None] | None]]] = {}
    for cell in content["cells"]:
        found = cell["protocols"].get(content["protocols"][0])
        printed = cell["printed"]
        panels.setdefault(cell["column"], {})[cell["row"]] = [
            (found["mean"], found["std"]) if found else None,
            (printed["mean"], printed["std"]) if printed else None]
    dots(panels, ("measured", "printed"), path, content["unit"], content["title"])


def write_table(table: Table, scale: str, folder: Path, seeds: Sequence[int], data_dir: Path) -> str:
    """Write the four files into `folder` from the finished runs there; return the Markdown without its evidence."""
    content = {"title": table.title, "name": table.name, "source": table.source, "unit": table.unit, "scale": scale,
               "protocols": list(table.protocols), "seeds": list(seeds), "note": table.note, "machine": machine(),
               "cells": [measure(cell, table, scale, folder, seeds, data_dir) for cell in table.cells]}
    with atomic(folder / "table.json", "w") as file:
        json.dump(content, file, indent=1)
    text = markdown(content)
    with atomic(folder / "table.md", "w") as file:
        file.write(text)
    write_csv(content, folder / "table.csv")
    draw(content, folder / "table.png")
    return text.partition("\n## Runs")[0] + f"\n\nWritten: {folder}/table.md, .csv, .json, .png"
