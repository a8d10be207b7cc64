"""One HTML file about runs: curves side by side, results, confusion matrices, pictures and tables of papers.

    python -m shared.report RUN... [--out report.html]

RUN is any output folder of this suite: of a trainer (stats.jsonl, result.json), of run_all.sh (report.json), of a
table (table.json), or a folder that holds some. The file needs no server, no network and no script.
"""
from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from shared.cli import Option, UserError, parse, run_main
from shared.report.history import read_json, read_lines
from shared.report.plots import svg_chart
from shared.report.table_report import TINY, about, grids, hardware_text
from shared.training.files import check_writable, make_dir, write_text
from shared.training.progress import duration

FLAGS = (
    Option("runs", required=True, many=True, metavar="RUN", help="output folder of a run, table or run_all.sh"),
    Option("--out", default="report.html", metavar="FILE", help="file of the page"),
    Option("--title", help="title of the page"
, default_help="the names of the folders"),
)
CONTENT_FILES, CURVE_FILES = ("table.json", "report.json", "result.json"), ("stats.jsonl", "metrics.json")
DEEPEST = 5  # folders below RUN that are searched
MOST_PICTURES = 12
MOST_ROWS = 12  # of single runs beside a table of a paper; more are shown on request
MOST_LINES = 10  # of a chart; of more, those that differ in the seed alone are averaged
MOST_POINTS = 400  # of a line; more are not seen
SEED = re.compile(r"[/_]seed_\d+(?=/|$)|/run(?=/|$)")
# Logged numbers about the run, not about the method.
HOUSEKEEPING = ("timestamp", "time", "Timing/", "Resources/", "Progress/", "images_per_second", "train/prefecth_time",
                "train/run_time", "step", "seconds")
STEPS = {"Progress/kimg": "thousands of images", "step": "step", "iteration": "iteration"}
CAPTIONS = {"table": "Measured (dots) and printed (squares), with standard deviations"}
Curve = tuple[list[float], list[float]]  # steps, values
Part = dict[str, Any]  # of the page: "kind" and the entries of page.html for this kind


# ---------------------------------------------------------------- what is in the folders


@dataclass
class Output:
    """One folder and its content. curves: metric -> (steps, values); xlabel: meaning of the steps."""
    name: str
    folder: Path
    files: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    xlabel: str = "step"


def search(root: Path, prefix: str) -> list[Output]:
    """Return the folders at and below `root` that hold results, in order of their paths; names start with `prefix`."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected the output folder of a run")
    folders = [root, *(path for path in sorted(root.rglob("*"))
                       if path.is_dir() and len(path.relative_to(root).parts) <= DEEPEST)]
    names = CONTENT_FILES + CURVE_FILES
    found = [read(folder, root.name if folder == root else f"{prefix}{folder.relative_to(root)}")
             for folder in folders if any((folder / name).is_file() for name in names)]
    if not found:
        raise UserError(f"{root} holds none of {', '.join(names)}; expected the output folder of a run")
    return found


def read(folder: Path, name: str) -> Output:
    output = Output(name, folder)
    for file in CONTENT_FILES:
        if (content := read_json(folder / file)) is not None:
            output.files[file] = content
    for file in CURVE_FILES:
        if (folder / file).is_file():
            read_curves(output, folder / file)
    return output


def read_curves(output: Output, path: Path) -> None:
    """Add the numbers of a file of JSON lines, each a number or {"mean": number}; a line cut short is left out."""
    for count, line in enumerate(read_lines(path)):
        if not isinstance(line, dict):
            return
        values = {key: value["mean"] if isinstance(value, dict) and "mean" in value else value
                  for key, value in line.items()}
        key = next((key for key in STEPS if isinstance(values.get(key), (int, float))), None)
        output.xlabel = STEPS[key] if key else "line"
        for name, value in values.items():
            if isinstance(value, (int, float)) and not name.startswith(HOUSEKEEPING):
                steps, numbers = output.curves.setdefault(name, ([], []))
                steps.append(float(values[key]) if key else float(count))
                numbers.append(float(value))


# ---------------------------------------------------------------- what the page shows of them


def build(folders: Sequence[Path], title: str) -> str:
    """Return the page about these folders: tables of papers, results of all runs, single runs, curves."""
    outputs = [output for folder in folders for output in search(folder, f"{folder.name}/" * (len(folders) > 1))]
    tables, others = ([output for output in outputs if ("table.json" in output.files) is table]
                      for table in (True, False))
    results = accuracies(outputs)
    if tables and len(others) > MOST_ROWS:
        results = [{**part, "fold": "Accuracy of every run"} for part in results]
    shown = {output.name: parts_of(output) for output in others}
    own = {name for name, parts in shown.items() if any(part["kind"] == "picture" for part in parts)}
    sections = [
        *({"title": output.name, "parts": parts_of(output)} for output in tables),
        {"title": "Results", "parts": results},
        *({"title": name, "parts": shown[name]} for name in shown if name in own),
        {"title": "Single runs", "parts": [part for name, parts in shown.items() if parts and name not in own
                                           for part in ({"kind": "h3", "text": name}, *parts)]},
        {"title": "Curves", "parts": charts(outputs), "charts": True}]
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page.filters["breakable"] = breakable
    return page.get_template("page.html").render(title=title, sections=[part for part in sections if part["parts"]])


def breakable(text: Any) -> Markup:
    """Let a path be broken after its slashes and underscores, or its column leaves no room on a phone."""
    return Markup(re.sub(r"(?<=[/_])", "<wbr>", str(escape(text))))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, fold: str = "", **more: Any) -> Part:
    """Return a table whose first column names the rows; with `fold` it is opened on request."""
    return {"kind": "table", "head": head, "rows": rows, "caption": caption, "fold": fold, **more}


def parts_of(output: Output) -> list[Part]:
    """Return the section of one folder: tables, facts, confusion matrix and pictures."""
    parts = paper_table(output.files["table.json"]) if "table.json" in output.files else []
    for name in ("report.json", "result.json"):
        content = output.files.get(name, {})
        rows = [[key.replace("_", " "), number(value) if isinstance(value, float) else value]
                for key, value in content.items() if isinstance(value, (str, int, float)) and value == value]
        parts += [table(["", ""], rows, name, fold=name)] * bool(rows)
        counts, classes = content.get("confusion_matrix"), content.get("classes")
        if counts and classes and len(classes) == len(counts):
            rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
            parts.append(table(["true \\ predicted", *classes], rows, "Confusion matrix, images of the test set",
                               fold="Confusion matrix", shaded=True))
    pictures = sorted(output.folder.glob("*.png"))
    for path in pictures[:MOST_PICTURES]:
        data = path.read_bytes()
        width = int.from_bytes(data[16:20], "big")  # of the PNG header
        parts.append({"kind": "picture", "text": CAPTIONS.get(path.stem, path.stem.replace("_", " ")),
                      "width": width, "data": data_address(data, "png")})
    if len(pictures) > MOST_PICTURES:
        parts.append({"kind": "p", "text": f"{len(pictures) - MOST_PICTURES} more pictures are in the folder."})
    return parts


def paper_table(content: Mapping[str, Any]) -> list[Part]:
    """Return a table of a paper: measured, printed, and the runs of every cell."""
    notes = [TINY.replace("`", "")] * (content["scale"] == "tiny") + [content["note"]] * bool(content["note"])
    parts: list[Part] = [{"kind": "aside", "text": note} for note in notes]
    for title, head, rows in grids(content):
        # Measured, printed, their distance: one below the other.
        lines = [[row[0], *(text.replace(" (", "\n").replace("; ", "\n").rstrip(")") for text in row[1:])]
                 for row in rows]
        parts.append(table(head, lines, title.rstrip(":") or content["title"], fold=title.rstrip(":")))
    parts.append({"kind": "p", "text": about(content)})
    if any(not cell["runs"] for cell in content["cells"]) and "command" in content:
        parts.append({"kind": "p", "text": f"Cells that are not run are filled by: {content['command']}"})
    runs = [[f"{cell['row']}, {cell['column']}", run["seed"], run["commit"], duration(run["seconds"]),
             hardware_text(run["hardware"]), ", ".join(run["configs"]) or "command line", run["folder"],
             ", ".join(run["logs"])] for cell in content["cells"] for run in cell["runs"]]
    head = ["cell", "seed", "commit", "time", "hardware", "configuration", "folder", "logs"]
    return parts + [table(head, runs, "Runs", fold="Runs behind the cells")] * bool(runs)


def accuracies(outputs: Sequence[Output]) -> list[Part]:
    """Return the accuracies of all runs by protocol, as one table."""
    found = {output.name: output.files["result.json"]["accuracy"] for output in outputs
             if isinstance(output.files.get("result.json", {}).get("accuracy"), Mapping)}
    protocols = list(dict.fromkeys(key for values in found.values() for key, value in values.items()
                                   if isinstance(value, float)))
    rows = [[name, *(f"{100 * values[key]:.2f}" if isinstance(values.get(key), float) else "–" for key in protocols)]
            for name, values in found.items()]
    head = ["run", *(key.replace("_", " ") for key in protocols)]
    return [table(head, rows, "Accuracy in % on the test set, by protocol")] * bool(rows)


def charts(outputs: Sequence[Output]) -> list[Part]:
    """Return one chart per metric, with a line for every run that has it; accuracies and losses first."""
    names = sorted({name for output in outputs for name in output.curves},
                   key=lambda name: (not any(word in name.lower() for word in ("acc", "top1", "fid")),
                                     "loss" not in name.lower(), name))
    drawn = []
    for name in names:
        having = [output for output in outputs if name in output.curves]
        lines = {output.name: output.curves[name] for output in having}
        drawn += chart(name, lines if len(lines) <= MOST_LINES else over_seeds(lines),
                       " or ".join(dict.fromkeys(output.xlabel for output in having)))
    return drawn


def over_seeds(lines: Mapping[str, Curve]) -> dict[str, Curve]:
    """Return the mean of the lines whose names differ in the seed alone and whose steps are the same."""
    groups: dict[tuple, list[str]] = {}
    for name, (steps, _) in lines.items():
        groups.setdefault((SEED.sub("", name), *steps), []).append(name)
    return {f"{key[0]}, mean of {len(names)}" if len(names) > 1 else names[0]:
            (lines[names[0]][0], [fmean(values) for values in zip(*(lines[name][1] for name in names), strict=True)])
            for key, names in groups.items()}


def chart(title: str, lines: Mapping[str, Curve], xlabel: str) -> list[Part]:
    """Return a line chart, told in words too; nothing without a finite value."""
    thinned = {name: (thin(x), thin(y)) for name, (x, y) in lines.items()}
    finite = [value for _, y in thinned.values() for value in y if math.isfinite(value)]
    if not finite:
        return []
    last = ", ".join(f"{name} {number(y[-1])}" for name, (_, y) in thinned.items())
    text = f"{title} over {xlabel}, from {number(min(finite))} to {number(max(finite))}; last: {last}"
    drawn = svg_chart(thinned, title, xlabel)
    return [{"kind": "chart", "text": text, "data": data_address(drawn.encode(), "svg+xml")}]


def thin(values: Sequence[float]) -> list[float]:
    """Return every n-th value, and the last one, so that about MOST_POINTS are left."""
    step = -(-len(values) // MOST_POINTS)
    return [*values[:-1:step], values[-1]]


def number(value: float) -> str:
    """Return a number short enough for a table: 0.9512, 1.3e-05, 1200."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e6 else f"{value:.4g}"


def data_address(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    check_writable(options.out, "--out")
    folders = [Path(folder).resolve() for folder in options.runs]
    text = build(folders, options.title or ", ".join(dict.fromkeys(folder.name for folder in folders)))
    make_dir(Path(options.out).parent)
    write_text(options.out, text)
    print(f"{options.out}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
