"""One HTML file about runs: curves side by side, results, confusion matrices, pictures and tables of papers.

    python -m shared.report RUN... [--out report.html]

RUN is any output folder of this suite: of a trainer (stats.jsonl, result.json), of run_all.sh (report.json), of a
table (table.json), or a folder that holds some. The file needs no server, no network and no script.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from shared.cli import Parser, UserError, run_main
from shared.report.__main__ import table_report, web_page
from shared.report.table_report import TINY
from shared.training.files import atomic, make_dir
from shared.training.progress import duration

FILES = ("table.json", "report.json", "result.json", "stats.jsonl", "metrics.json")
DEEPEST = 5  # folders below RUN that are searched
MOST_PICTURES = 12
MOST_ROWS = 12  # of single runs beside a table of a paper; more are shown on request
MOST_LINES = 10  # of a chart; where there are more, those that differ in the seed alone are averaged
SEED = re.compile(r"[/_]seed_\d+(?=/|$)|/run(?=/|$)")
# What a run logs about itself rather than about its method.
HOUSEKEEPING = ("timestamp", "time", "Timing/", "Resources/", "Progress/", "images_per_second", "train/prefecth_time",
                "train/run_time", "step", "seconds")
STEPS = {"Progress/kimg": "thousands of images", "step": "step", "iteration": "iteration"}
Curve = tuple[list[float], list[float]]  # steps, values


@dataclass
class Found:
    """One folder and what is in it. curves: metric -> (steps, values); xlabel: what the steps are."""
    name: str
    folder: Path
    files: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    xlabel: str = "step"


def search(root: Path, prefix: str) -> list[Found]:
    """Return the folders at and below `root` that hold results, in order of their paths; names start with `prefix`."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected the output folder of a run")
    folders = [root, *(path for path in sorted(root.rglob("*"))
                       if path.is_dir() and len(path.relative_to(root).parts) <= DEEPEST)]
    found = [read(folder, root, prefix) for folder in folders if any((folder / name).is_file() for name in FILES)]
    if not found:
        raise UserError(f"{root} holds none of {', '.join(FILES)}; expected the output folder of a run")
    return found


def read(folder: Path, root: Path, prefix: str) -> Found:
    found = Found(root.name if folder == root else f"{prefix}{folder.relative_to(root)}", folder)
    for name in FILES[:3]:
        if (folder / name).is_file():
            try:
                found.files[name] = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{folder / name} is damaged: {error}") from None
    for name in FILES[3:]:
        if (folder / name).is_file():
            read_curves(found, folder / name)
    return found


def read_curves(found: Found, path: Path) -> None:
    """Add the numbers of a file of JSON lines, each a number or {"mean": number}; a line cut short is left out."""
    for count, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            return
        values = {key: value["mean"] if isinstance(value, dict) and "mean" in value else value
                  for key, value in line.items()}
        key = next((key for key in STEPS if isinstance(values.get(key), (int, float))), None)
        found.xlabel = STEPS[key] if key else "line"
        for name, value in values.items():
            if isinstance(value, (int, float)) and not name.startswith(HOUSEKEEPING):
                steps, numbers = found.curves.setdefault(name, ([], []))
                steps.append(float(values[key]) if key else float(count))
                numbers.append(float(value))


def charts(runs: Sequence[Found]) -> list[str]:
    """Return one chart per metric, with a line for every run that has it; losses and accuracies first."""
    names = sorted({name for run in runs for name in run.curves},
                   key=lambda name: (not any(word in name.lower() for word in ("acc", "top1", "fid")),
                                     "loss" not in name.lower(), name))
    drawn = []
    for name in names:
        having = [run for run in runs if name in run.curves]
        labels = dict.fromkeys(run.xlabel for run in having)
        lines = {run.name: run.curves[name] for run in having}
        drawn.append(web_page.chart(name, lines if len(lines) <= MOST_LINES else over_seeds(lines),
                                    " or ".join(labels)))
    return ['<div class="charts">', *filter(None, drawn), "</div>"] if any(drawn) else []


def over_seeds(lines: Mapping[str, Curve]) -> dict[str, Curve]:
    """Return the mean of the lines whose names differ in the seed alone and whose steps are the same."""
    groups: dict[tuple, list[str]] = {}
    for name, (steps, _) in lines.items():
        groups.setdefault((SEED.sub("", name), *steps), []).append(name)
    return {f"{key[0]}, mean of {len(names)}" if len(names) > 1 else names[0]:
            (lines[names[0]][0], [fmean(values) for values in zip(*(lines[name][1] for name in names), strict=True)])
            for key, names in groups.items()}


def accuracy_rows(runs: Sequence[Found]) -> list[str]:
    """Return the accuracies of all runs by protocol, as one table."""
    having = [(run.name, run.files["result.json"]["accuracy"]) for run in runs
              if isinstance(run.files.get("result.json", {}).get("accuracy"), Mapping)]
    if not having:
        return []
    protocols = list(dict.fromkeys(key for _, accuracy in having for key, value in accuracy.items()
                                   if isinstance(value, float)))
    rows = [[name, *(f"{100 * accuracy[key]:.2f}" if isinstance(accuracy.get(key), float) else "–"
                     for key in protocols)] for name, accuracy in having]
    return [web_page.table(["run", *(key.replace("_", " ") for key in protocols)], rows,
                           "Accuracy in % on the test set, by protocol")]


def facts(content: Mapping[str, Any], caption: str) -> str:
    """Return the plain numbers and words of a result as a table that opens on request."""
    rows = [[key.replace("_", " "), web_page.number(value) if isinstance(value, float) else value]
            for key, value in content.items() if isinstance(value, (str, int, float)) and value == value]
    return web_page.details(caption, web_page.table(["", ""], rows, caption)) if rows else ""


def paper_table(content: Mapping[str, Any]) -> list[str]:
    """Return a table of a paper: measured, printed, and what stands behind every cell."""
    notes = [TINY.replace("`", "")] * (content["scale"] == "tiny") + [content["note"]] * bool(content["note"])
    parts = [f'<p class="note">{escape(note)}</p>' for note in notes]
    for title, head, rows in table_report.grids(content):
        # Measured, printed, their distance: one below the other.
        lines = [[row[0], *(text.replace(" (", "\n").replace("; ", "\n").rstrip(")") for text in row[1:])]
                 for row in rows]
        grid = web_page.table(head, lines, title.rstrip(":") or content["title"])
        parts.append(web_page.details(title.rstrip(":"), grid) if title else grid)
    parts.append(f"<p>{escape(table_report.about(content))}</p>")
    runs = [[f"{cell['row']}, {cell['column']}", run["seed"], run["commit"], duration(run["seconds"]),
             table_report.hardware_text(run["hardware"]), ", ".join(run["configs"]) or "command line", run["folder"],
             ", ".join(run["logs"])]
            for cell in content["cells"] for run in cell["runs"]]
    if runs:
        head = ["cell", "seed", "commit", "time", "hardware", "configuration", "folder", "logs"]
        parts.append(web_page.details("Runs behind the cells", web_page.table(head, runs, "Runs")))
    return parts


def about(run: Found) -> list[str]:
    """Return the section of one folder: tables, facts, confusion matrix and pictures."""
    parts: list[str] = []
    if "table.json" in run.files:
        parts += paper_table(run.files["table.json"])
    for name in ("report.json", "result.json"):
        content = run.files.get(name, {})
        if content:
            parts.append(facts(content, name))
        counts, classes = content.get("confusion_matrix"), content.get("classes")
        if counts and classes and len(classes) == len(counts):
            parts.append(web_page.details("Confusion matrix", web_page.matrix(
                counts, classes, "Confusion matrix, images of the test set")))
    pictures = sorted(run.folder.glob("*.png"))
    known = {"table": "Measured (dots) and printed (squares), with standard deviations"}
    parts += [web_page.picture(path, known.get(path.stem, path.stem.replace("_", " ")))
              for path in pictures[:MOST_PICTURES]]
    if len(pictures) > MOST_PICTURES:
        parts.append(f"<p>{len(pictures) - MOST_PICTURES} more pictures are in the folder.</p>")
    return [part for part in parts if part]


def build(folders: Sequence[Path], title: str) -> str:
    """Return the page about these folders: tables of papers, results of all runs, single runs, curves."""
    runs = [run for folder in folders for run in search(folder, f"{folder.name}/" if len(folders) > 1 else "")]
    links: dict[str, str] = {}
    body: list[str] = []

    def add(anchor: str, heading: str, parts: Sequence[str]) -> None:
        if parts:
            links[anchor] = heading
            body.append(web_page.section(anchor, heading, parts))

    tables, others = ([run for run in runs if ("table.json" in run.files) is table] for table in (True, False))
    for i, run in enumerate(tables):
        add(f"table{i}", run.name, about(run))
    overview = accuracy_rows(runs)
    if tables and overview and len(others) > MOST_ROWS:
        overview = [web_page.details("Accuracy of every run", overview[0])]
    add("results", "Results", overview)
    short = []
    for i, run in enumerate(others):
        parts = about(run)
        if any("<img" in part for part in parts):
            add(f"run{i}", run.name, parts)
        elif parts:
            short += [f"<h3>{escape(run.name)}</h3>", *parts]
    add("runs", "Single runs", short)
    add("curves", "Curves", charts(runs))
    return web_page.page(title, links, body)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run, table or run_all.sh")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="[report.html]")
    parser.add_argument("--title", default=None, help="[the names of the folders]")
    options = parser.parse_args(argv)
    folders = [folder.resolve() for folder in options.runs]
    text = build(folders, options.title or ", ".join(dict.fromkeys(folder.name for folder in folders)))
    make_dir(options.out.parent)
    with atomic(options.out, "w") as file:
        file.write(text)
    print(f"{options.out}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
