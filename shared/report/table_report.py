"""The output of shared/report/tables.py: numbers, and table.md, table.csv, table.json and table.png."""
from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.cli import UserError
from shared.report.plots import dots
from shared.training.files import write_csv, write_json, write_text
from shared.training.progress import duration

TINY = ("Made at `--scale tiny`: the digits, tiny networks and short runs. It shows that every command of the table "
        "works; its numbers say nothing about those of the paper.")
CSV_HEAD = ("row", "column", "protocol", "mean", "std", "runs", "printed", "printed_std", "deviations")
Content = Mapping[str, Any]  # of table.json, or of one of its cells
Grid = tuple[str, list[str], list[list[str]]]  # title, head, rows

# ---------------------------------------------------------------- statistics over seeds


def known(values: Sequence[float | None]) -> list[float]:
    """Return the values that are there."""
    return [value for value in values if value is not None]


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values, None if there are none."""
    return statistics.fmean(known(values)) if known(values) else None


def std(values: Sequence[float | None]) -> float | None:
    """Return the standard deviation of a sample (n - 1), None for fewer than two values."""
    return statistics.stdev(known(values)) if len(known(values)) > 1 else None


def difference(a: Sequence[float | None], b: Sequence[float | None]) -> dict[str, Any] | None:
    """Return mean and standard error of the differences a - b of the seeds that have both, and how many are above 0."""
    pairs = [x - y for x, y in zip(a, b, strict=False) if x is not None and y is not None]
    if not pairs:
        return None
    error = None if std(pairs) is None else std(pairs) / len(pairs) ** 0.5
    return {"mean": mean(pairs), "standard_error": error, "positive": sum(pair > 0 for pair in pairs),
            "seeds": len(pairs)}


def deviations_from_print(measured: float | None, measured_std: float | None, printed: float,
                          printed_std: float | None) -> float | None:
    """Return (measured - printed) in standard deviations of one run: the printed one, else the measured one.

    None where neither is known or it is 0: then a difference has no scale.
    """
    scale = printed_std or measured_std
    return None if measured is None or not scale else (measured - printed) / scale


def measure(cell: Any, protocols: Sequence[str], folder: Path,
            runs: Sequence[tuple[int, Path, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the numbers of one cell under each protocol, and the evidence for them, as table.json has them.

    cell: a Cell of tables.py. folder: that of the table. runs: (seed, folder, run.json) of those that are finished.
    Raises UserError if one has no number of the cell's metric.
    """
    content: dict[str, Any] = {
        "row": cell.row, "column": cell.column, "metric": cell.metric, "protocols": {}, "over_base": None,
        "printed": cell.printed and vars(cell.printed), "deviations": None,
        "runs": [{"seed": seed, "folder": os.path.relpath(path, folder), "commit": run["commit"],
                  "hardware": {**run["hardware"], "threads": run["threads"]}, "seconds": sum(run["stages"].values()),
                  "processor": sum(run.get("processor", {}).values()), "earlier": run.get("earlier", []),
                  "logs": [f"{name}.log" for name in run["stages"]],
                  "configs": [file.name for file in cell.job.configs if (path / file.name).is_file()]}
                 for seed, path, run in runs]}
    for _, path, run in runs:
        if cell.metric not in run["result"]:
            raise UserError(f"{path / 'run.json'} has no {cell.metric}; it has {', '.join(run['result'])}")
    for protocol in protocols:
        values = [run["result"][cell.metric].get(protocol) for _, _, run in runs]
        if known(values):
            content["protocols"][protocol] = {"mean": mean(values), "std": std(values), "values": values}
    first = content["protocols"].get(protocols[0])
    if cell.printed and first:
        content["deviations"] = deviations_from_print(first["mean"], first["std"], cell.printed.mean, cell.printed.std)
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
            cell["over_base"] = difference(list(own.values()), [other.get(seed) for seed in own])


# ---------------------------------------------------------------- text


def number(value: float, error: float | None) -> str:
    """Return "95.03 ± 0.06", without the second part where there is no deviation."""
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


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


def grids(content: Content, linked: bool = False) -> list[Grid]:
    """Return the grids of a table: measured, minus the base, by other protocols; side by side if it has one column."""
    first, *others = content["protocols"]
    others = [name for name in others if any(name in cell["protocols"] for cell in content["cells"])]

    def measured(cell: Content) -> str:
        return cell_text(cell, first) + f" [{len(cell['runs'])}](#{anchor(cell)})" * (linked and bool(cell["runs"]))

    def by(protocol: str) -> Callable[[Content], str]:
        return lambda cell: cell_text({**cell, "printed": None}, protocol)

    minus = {f"minus {content['base']}": over_base} if any(cell["over_base"] for cell in content["cells"]) else {}
    if len({cell["column"] for cell in content["cells"]}) == 1:
        return [("", *_grid(content, {first: measured, **{name: by(name) for name in others}, **minus}, timed=True))]
    return [("", *_grid(content, {"": measured}, timed=True)),
            *((f"{title[0].upper()}{title[1:]}:", *_grid(content, {"": view})) for title, view in minus.items()),
            *((f"By another protocol, {name}:", *_grid(content, {"": by(name)})) for name in others)]


def _grid(content: Content, views: Mapping[str, Callable[[Content], str]], timed: bool = False
          ) -> tuple[list[str], list[list[str]]]:
    """Return (head, rows). views: what is said of each cell, side by side, by its name in the head; timed: and the mean
    time of the runs of a row."""
    columns = list(dict.fromkeys(cell["column"] for cell in content["cells"]))
    rows: dict[str, dict[str, Content]] = {}
    for cell in content["cells"]:
        rows.setdefault(cell["row"], {})[cell["column"]] = cell
    lines = []
    for row, cells in rows.items():
        seconds = {run["folder"]: run["seconds"] for cell in cells.values() for run in cell["runs"]}
        time = duration(mean(list(seconds.values()))) if seconds else ""
        lines.append([row, *(view(cells[column]) if column in cells else "" for view in views.values()
                             for column in columns), *[time] * timed])
    head = [name if name and len(columns) == 1 else column for name in views for column in columns]
    return ["", *head, *["time of a run"] * timed], lines


def about(content: Content) -> str:
    """Return unit, protocol, seeds and source, and on what the runs were made."""
    cells, seeds = content["cells"], ", ".join(map(str, content["seeds"]))
    runs = {run["folder"]: run for cell in cells for run in cell["runs"]}.values()
    protocol = f", {content['protocols'][0]}" * (len({cell["column"] for cell in cells}) > 1)
    over = f"mean ± standard deviation over seeds {seeds}" if len(content["seeds"]) > 1 else f"seed {seeds}"
    text = f"{content['unit']}{protocol}; {over}."
    if any(cell["printed"] for cell in cells):
        text += f" Printed numbers: {content['source']}; sd: standard deviations between print and here."
    if any(cell["over_base"] for cell in cells):
        text += f" Minus {content['base']}: mean difference seed by seed, in brackets the seeds above it."
    if runs:
        machines = "; ".join(dict.fromkeys(hardware_text(run["hardware"]) for run in runs))
        commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
        text += (f" {len(runs)} run{'s' * (len(runs) > 1)} on {machines}, "
                 f"{duration(sum(run['processor'] for run in runs))} of processors in all; commit {commits}.")
    return text


def hardware_text(hardware: Content) -> str:
    threads = f", threads a run: {hardware['threads']}" if hardware["threads"] else ""
    cores = f"{hardware['cores']} core{'s' * (hardware['cores'] != 1)}"
    return f"{hardware['hardware']} ({cores}{threads}, torch {hardware['torch']})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def markdown(content: Content, linked: bool = True) -> str:
    """Return table.md; linked=False: the short form, without the evidence and further protocols' own tables."""
    parts = [f"# {content['title']}", *[TINY] * (content["scale"] == "tiny"), *filter(None, [content["note"]])]
    for title, head, rows in grids(content, linked)[:None if linked else 1 + bool(content["base"])]:
        parts += [*filter(None, [title]), markdown_table(head, rows)]
    parts.append(about(content))
    if linked:
        parts += ["## Runs", "The linked number in a cell counts the runs behind it."]
        for cell in content["cells"]:
            if cell["runs"]:
                parts += [f"### {cell['row']}, {cell['column']}\n<a id=\"{anchor(cell)}\"></a>",
                          "\n".join(_evidence(run) for run in cell["runs"])]
    return "\n\n".join(parts) + "\n"


def _evidence(run: Content) -> str:
    """Return a line with the links of a run."""
    def links(names: Sequence[str]) -> str:
        return ", ".join(f"[{name}]({run['folder']}/{name})" for name in names)

    starts = run["earlier"]
    interrupted = (f" since the last of {len(starts)} interruptions (begun at commit {starts[0]['commit']})"
                   if starts else "")
    return (f"- seed {run['seed']}: {links(['run.json'])} (commands, result), configuration "
            f"{links(run['configs']) or 'on the command line'}, commit {run['commit']}, "
            f"{duration(run['seconds'])}{interrupted} ({duration(run['processor'])} of processors) on "
            f"{hardware_text(run['hardware'])}; {links(run['logs'])}")


# ---------------------------------------------------------------- files


def write_table(content: Content, folder: Path) -> str:
    """Write the four files into `folder`; return the Markdown without its evidence."""
    if content["base"]:
        compare(content["cells"], content["base"], content["protocols"][0])
    write_json(folder / "table.json", content)
    write_text(folder / "table.md", markdown(content))
    write_csv(folder / "table.csv", CSV_HEAD, csv_rows(content))
    panels: dict[str, dict[str, list[tuple[float, float | None] | None]]] = {}
    for cell in content["cells"]:
        found = cell["protocols"].get(content["protocols"][0])
        panels.setdefault(cell["column"], {})[cell["row"]] = [
            (value["mean"], value["std"]) if value else None for value in (found, cell["printed"])]
    dots(panels, ("measured", "printed"), folder / "table.png", content["unit"], content["title"])
    return f"{markdown(content, linked=False)}\nWritten: {folder}/table.md, .csv, .json, .png"


def csv_rows(content: Content) -> Iterator[list[Any]]:
    """Yield one line per cell and protocol."""
    for cell in content["cells"]:
        for protocol in content["protocols"]:
            found = cell["protocols"].get(protocol, {"mean": "not run", "std": None, "values": ()})
            # Print has one protocol.
            printed = cell["printed"] if protocol == content["protocols"][0] else None
            compared = (printed["mean"], printed["std"], cell["deviations"]) if printed else (None, None, None)
            yield [cell["row"], cell["column"], protocol, found["mean"], found["std"], len(known(found["values"])),
                   *compared]
