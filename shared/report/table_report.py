"""What a table of shared/report/tables.py leaves: table.md, table.csv, table.json and table.png beside its runs."""
from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.cli import UserError
from shared.report.aggregate import deviation, deviations_from_print, difference, mean
from shared.report.table_runs import Cell, Table, Task
from shared.training.files import atomic
from shared.training.hardware import machine
from shared.training.progress import duration

TINY = ("Made at `--scale tiny`: the digits, tiny networks and short runs. It shows that every command of the table "
        "works; its numbers say nothing about those of the paper.")
Content = Mapping[str, Any]  # of table.json, or of one of its cells


# ------------------------------------------------------------------------------------------------------------- numbers

def runs_of(cell: Cell, runs: Path, seeds: Sequence[int], data_dir: Path) -> Iterator[tuple[int, Path, dict[str, Any]]]:
    """Yield (seed, folder, run.json) of the finished runs of a cell; one of another configuration raises UserError."""
    for seed in seeds:
        task = Task(cell.job, seed, runs / cell.job.name / f"seed_{seed}", data_dir)
        if task.finished():
            yield seed, task.folder, task.record()


def measure(cell: Cell, table: Table, scale: str, folder: Path, runs: Path, seeds: Sequence[int],
            data_dir: Path) -> dict[str, Any]:
    """Return the numbers of one cell under each protocol, and the evidence for them."""
    found = list(runs_of(cell, runs, seeds, data_dir))
    content: dict[str, Any] = {
        "row": cell.row, "column": cell.column, "metric": cell.metric, "protocols": {}, "over_base": None,
        "printed": None if cell.printed is None or scale != "paper" else vars(cell.printed),
        "runs": [{"seed": seed, "folder": os.path.relpath(path, folder), "commit": run["commit"],
                  "hardware": {**run["hardware"], "threads": run["threads"]}, "seconds": sum(run["stages"].values()),
                  "processor": sum(run.get("processor", {}).values()), "earlier": run.get("earlier", []),
                  "logs": [f"{name}.log" for name in run["stages"]],
                  "configs": [config.name for config in cell.job.configs if (path / config.name).is_file()]}
                 for seed, path, run in found]}
    for _, path, run in found:
        if cell.metric not in run["result"]:
            raise UserError(f"{path / 'run.json'} has no {cell.metric}; it has {', '.join(run['result'])}")
    for protocol in table.protocols:
        values = [run["result"][cell.metric].get(protocol) for _, _, run in found]
        if mean(values) is not None:
            content["protocols"][protocol] = {"mean": mean(values), "std": deviation(values), "values": values}
    printed, first = content["printed"], content["protocols"].get(table.protocols[0])
    content["deviations"] = None if printed is None or first is None else deviations_from_print(
        first["mean"], first["std"], printed["mean"], printed["std"])
    return content


def compare(cells: Sequence[dict[str, Any]], base: str, protocol: str) -> None:
    """Add to every cell its differences from the cell of the row `base` in its column, over the seeds of both."""
    def by_seed(cell: Content) -> dict[int, float | None]:
        values = cell["protocols"].get(protocol, {}).get("values", [])
        return dict(zip([run["seed"] for run in cell["runs"]], values, strict=False))

    bases = {cell["column"]: by_seed(cell) for cell in cells if cell["row"] == base}
    for cell in cells:
        if cell["row"] != base:
            own, other = by_seed(cell), bases[cell["column"]]
            cell["over_base"] = difference([own[seed] for seed in own], [other.get(seed) for seed in own])


# ---------------------------------------------------------------------------------------------------------------- text

def number(mean_: float, std: float | None) -> str:
    """Return "95.03 ± 0.06", without the second part where there is no deviation."""
    return f"{mean_:.2f}" if std is None else f"{mean_:.2f} ± {std:.2f}"


def cell_text(cell: Content, protocol: str) -> str:
    """Return what was measured; beside it what is printed, if anything, and how far they are apart."""
    found, printed = cell["protocols"].get(protocol), cell["printed"]
    text = number(found["mean"], found["std"]) if found else "not run"
    if printed is not None:
        apart = "" if cell["deviations"] is None else f"; {cell['deviations']:+.1f} sd"
        text += f" (printed {number(printed['mean'], printed['std'])}{apart})"
    return text


def over_base(cell: Content) -> str:
    """Return "+2.1 (2 of 3)": the mean difference from the base row, and how many seeds are above it."""
    found = cell["over_base"]
    return "" if found is None else f"{found['mean']:+.2f} ({found['positive']} of {found['seeds']})"


def anchor(cell: Content) -> str:
    """Return the Markdown anchor of the evidence of a cell."""
    text = f"{cell['row']} {cell['column']}".lower().replace("+", " plus ")  # CReST is not CReST+
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text).split())


def grid(content: Content, views: Mapping[str, Callable[[Content], str]], timed: bool = False
         ) -> tuple[list[str], list[list[str]]]:
    """Return (head, rows) of the cells; views: what is said of each, side by side, with its name in the head. timed:
    with the mean time of the runs of a row."""
    cells = content["cells"]
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    by_place = {(cell["row"], cell["column"]): cell for cell in cells}
    head = [" ".join(filter(None, (column if len(columns) > 1 or not name else "", name)))
            for name in views for column in columns]
    rows = []
    for row in dict.fromkeys(cell["row"] for cell in cells):
        places = [by_place.get((row, column)) for column in columns]
        rows.append([row, *("" if cell is None else view(cell) for view in views.values() for cell in places),
                     *[run_time([cell for cell in places if cell is not None])] * timed])
    return ["", *head, *["time of a run"] * timed], rows


def run_time(cells: Sequence[Content]) -> str:
    """Return the mean time of the runs behind the cells."""
    seconds = {run["folder"]: run["seconds"] for cell in cells for run in cell["runs"]}
    return duration(mean(list(seconds.values()))) if seconds else ""


def grids(content: Content, linked: bool = False) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, head, rows) of a table; all protocols side by side where it has one column."""
    def measured(cell: Content) -> str:
        link = f" [{len(cell['runs'])}](#{anchor(cell)})" if linked and cell["runs"] else ""
        return cell_text(cell, content["protocols"][0]) + link

    def other(protocol: str) -> Callable[[Content], str]:
        return lambda cell: cell_text({**cell, "printed": None}, protocol)

    cells = content["cells"]
    protocols = [name for name in content["protocols"][1:] if any(name in cell["protocols"] for cell in cells)]
    above = {f"minus {content['base']}": over_base} if any(cell["over_base"] for cell in cells) else {}
    if len({cell["column"] for cell in cells}) == 1:
        views = {content["protocols"][0]: measured, **{name: other(name) for name in protocols}, **above}
        return [("", *grid(content, views, timed=True))]
    return [("", *grid(content, {"": measured}, timed=True)),
            *((f"{title[0].upper()}{title[1:]}:", *grid(content, {"": view})) for title, view in above.items()),
            *((f"By another protocol, {name}:", *grid(content, {"": other(name)})) for name in protocols)]


def about(content: Content) -> str:
    """Return unit, protocol, seeds and source, and on what the runs were made."""
    runs = {run["folder"]: run for cell in content["cells"] for run in cell["runs"]}.values()
    printed = any(cell["printed"] for cell in content["cells"])
    machines = dict.fromkeys(hardware_text(run["hardware"]) for run in runs)
    protocol = f", {content['protocols'][0]}" * (len({cell["column"] for cell in content["cells"]}) > 1)
    seeds = ", ".join(map(str, content["seeds"]))
    over = f"mean ± standard deviation over seeds {seeds}" if len(content["seeds"]) > 1 else f"seed {seeds}"
    parts = [f"{content['unit']}{protocol}; {over}."]
    parts += [f"Printed numbers: {content['source']}; sd: standard deviations between print and here."] * printed
    if any(cell["over_base"] for cell in content["cells"]):
        parts.append(f"Minus {content['base']}: mean difference seed by seed, in brackets the seeds above it.")
    if runs:
        parts.append(f"{len(runs)} run{'s' * (len(runs) > 1)} on {'; '.join(machines)}, "
                     f"{duration(sum(run['processor'] for run in runs))} of processors in all; commit "
                     f"{', '.join(dict.fromkeys(run['commit'] for run in runs))}.")
    return " ".join(parts)


def hardware_text(hardware: Content) -> str:
    threads = f", threads a run: {hardware['threads']}" if hardware["threads"] else ""
    cores = f"{hardware['cores']} core{'s' * (hardware['cores'] != 1)}"
    return f"{hardware['hardware']} ({cores}{threads}, torch {hardware['torch']})"


def markdown(content: Content, linked: bool = True) -> str:
    """Return table.md; linked=False: the short form, without the evidence and further protocols' own tables."""
    lines = [f"# {content['title']}", ""]
    lines += [TINY, ""] * (content["scale"] == "tiny") + [content["note"], ""] * bool(content["note"])
    for title, head, rows in grids(content, linked)[:None if linked else 1 + bool(content["base"])]:
        lines += [title, ""] * bool(title)
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [about(content), ""]
    if not linked:
        return "\n".join(lines)
    lines += ["## Runs", "", "The linked number in a cell counts the runs behind it.", ""]
    for cell in content["cells"]:
        if cell["runs"]:
            lines += [f"### {cell['row']}, {cell['column']}", f'<a id="{anchor(cell)}"></a>', ""]
            lines += [evidence(run) for run in cell["runs"]] + [""]
    return "\n".join(lines)


def evidence(run: Content) -> str:
    """Return a line with the links of a run."""
    def links(names: Sequence[str]) -> str:
        return ", ".join(f"[{name}]({run['folder']}/{name})" for name in names)

    starts = run["earlier"]
    broken_off = ""
    if starts:
        broken_off = f" since the last of {len(starts)} interruptions (begun at commit {starts[0]['commit']})"
    return (f"- seed {run['seed']}: {links(['run.json'])} (commands, result), configuration "
            f"{links(run['configs']) or 'on the command line'}, commit {run['commit']}, "
            f"{duration(run['seconds'])}{broken_off} ({duration(run['processor'])} of processors) on "
            f"{hardware_text(run['hardware'])}; {links(run['logs'])}")


# --------------------------------------------------------------------------------------------------------------- files

def write_csv(content: Content, path: Path) -> None:
    """Write one line per cell and protocol."""
    with atomic(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "column", "protocol", "mean", "std", "runs", "printed", "printed_std", "deviations"])
        for cell in content["cells"]:
            for protocol in content["protocols"]:
                found = cell["protocols"].get(protocol, {"mean": "not run", "std": None, "values": ()})
                # Print has one protocol.
                printed = cell["printed"] if protocol == content["protocols"][0] else None
                compared = (printed["mean"], printed["std"], cell["deviations"]) if printed else (None, None, None)
                writer.writerow([cell["row"], cell["column"], protocol, found["mean"], found["std"],
                                 sum(value is not None for value in found["values"]), *compared])


def draw(content: Content, path: Path) -> None:
    """Write a panel per column: what is measured (dots) beside what is printed (open squares), with deviations."""
    from shared.report.plots import dots

    panels: dict[str, dict[str, list[tuple[float, float | None] | None]]] = {}
    for cell in content["cells"]:
        found = cell["protocols"].get(content["protocols"][0])
        panels.setdefault(cell["column"], {})[cell["row"]] = [
            (value["mean"], value["std"]) if value else None for value in (found, cell["printed"])]
    dots(panels, ("measured", "printed"), path, content["unit"], content["title"])


def write_table(table: Table, scale: str, folder: Path, runs: Path, seeds: Sequence[int], data_dir: Path) -> str:
    """Write the four files into `folder` from the finished runs in `runs`; return the Markdown without its evidence."""
    cells = [measure(cell, table, scale, folder, runs, seeds, data_dir) for cell in table.cells]
    if table.base:
        compare(cells, table.base, table.protocols[0])
    content = {"title": table.title, "name": table.name, "source": table.source, "unit": table.unit, "scale": scale,
               "protocols": list(table.protocols), "seeds": list(seeds), "note": table.note, "base": table.base,
               "machine": machine(), "cells": cells}
    with atomic(folder / "table.json", "w") as file:
        json.dump(content, file, indent=1)
    with atomic(folder / "table.md", "w") as file:
        file.write(markdown(content))
    write_csv(content, folder / "table.csv")
    draw(content, folder / "table.png")
    return f"{markdown(content, linked=False)}\nWritten: {folder}/table.md, .csv, .json, .png"
