"""Pieces of one self-contained HTML page: charts, tables, matrices, pictures. No script, no server, nothing loaded."""
from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # line name -> (x, y)

# Told apart by dashes as well as by colour (Okabe and Ito's palette).
LINES = (("#0072b2", ""), ("#d55e00", "6 3"), ("#009e73", "2 3"), ("#cc79a7", "8 3 2 3"), ("#e69f00", "12 4"),
         ("#56b4e9", "4 2"), ("#000000", "1 2"))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 240, 56, 12, 12, 34
MOST_POINTS = 400  # more are not seen at this width

STYLE = """
:root { color-scheme: light dark; --line: #8886; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { border-top: 1px solid var(--line); padding-top: 1rem; }
h2, h3 { line-height: 1.25; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
a { color: #0072b2; } @media (prefers-color-scheme: dark) { a { color: #7cc4f0; } }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
li { min-width: 0; }
.wide { overflow-x: auto; margin-bottom: .75rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .2rem .5rem; text-align: right; white-space: pre;
  overflow-wrap: normal; }
th[scope=row], thead th:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th[scope=row] { white-space: normal; }
@media (max-width: 30rem) { th, td { font-size: .8rem; padding: .1rem .3rem; } }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
img { max-width: 100%; height: auto; image-rendering: pixelated; background: #fff; }
.key { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0; margin: .25rem 0; list-style: none; font-size: .85rem; }
.key svg { width: 2rem; height: .6rem; } summary { cursor: pointer; }
.note { border-left: 4px solid #e69f00; padding-left: .6rem; }
"""


def page(title: str, links: Mapping[str, str], body: Sequence[str]) -> str:
    """Return the whole page. links: anchor -> text of the navigation."""
    items = "".join(f'<li><a href="#{escape(anchor)}">{escape(text)}</a></li>' for anchor, text in links.items())
    return ("<!DOCTYPE html>\n"
            f'<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>'
            f'<a class="skip" href="#content">Skip to the content</a><header><h1>{escape(title)}</h1></header>'
            f'<nav aria-label="Sections"><ul>{items}</ul></nav><main id="content">\n' + "\n".join(body)
            + "\n</main></body></html>\n")


def section(anchor: str, title: str, parts: Sequence[str]) -> str:
    return f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table whose first column names the rows and stays in sight."""
    return _table(columns, [(row[0], "".join(f"<td>{escape(str(value))}</td>" for value in row[1:])) for row in rows],
                  caption)


def details(summary: str, content: str) -> str:
    """Return what opens on request."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(columns: Sequence[str], rows: Sequence[tuple[str, str]], caption: str) -> str:
    """Return a table of rows (name, cells in HTML)."""
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in columns)
    # A path may be broken behind its slashes and underscores, or the column would leave no room on a phone.
    names = [re.sub(r"(?<=[/_])", "<wbr>", escape(str(name))) for name, _ in rows]
    lines = "".join(f'<tr><th scope="row">{name}</th>{cells}</tr>\n'
                    for name, (_, cells) in zip(names, rows, strict=True))
    return _wide(caption, f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table>")


def _wide(caption: str, content: str) -> str:
    """Return a figure that scrolls inside its own box, by keyboard too."""
    return (f'<figure><figcaption>{escape(caption)}</figcaption><div class="wide" tabindex="0" role="region" '
            f'aria-label="{escape(caption)}">{content}</div></figure>')


def matrix(counts: Sequence[Sequence[int]], classes: Sequence[str], caption: str) -> str:
    """Return a confusion matrix: row = true class, column = predicted; the shade is the share of the row."""
    def cell(count: int, total: int) -> str:
        share = count / max(1, total)
        colour = "#fff" if share > 0.5 else "inherit"
        return f'<td style="background:rgba(0,114,178,{share:.2f});color:{colour}">{count}</td>'

    rows = [(name, "".join(cell(count, sum(row)) for count in row))
            for name, row in zip(classes, counts, strict=True)]
    return _table(["true \\ predicted", *classes], rows, caption)


def picture(path: Path, text: str) -> str:
    """Return a PNG file, carried inside the page; it is not made smaller than can be read, but scrolls."""
    data = path.read_bytes()
    width = int.from_bytes(data[16:20], "big")  # of the PNG header
    return _wide(text, f'<img alt="{escape(text)}" style="min-width:min({width}px,40rem)" '
                       f'src="data:image/png;base64,{base64.b64encode(data).decode()}">')


def number(value: float) -> str:
    """Return a number short enough for a table: 0.9512, 1.3e-05, 1200."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def chart(title: str, series: Series, xlabel: str) -> str:
    """Return a line chart with its key, which has the last number of every line.

    Values that are not finite leave gaps; a chart without a finite value is left out ("").
    """
    thinned = {name: thin(x, y) for name, (x, y) in series.items()}
    finite = [value for _, y in thinned.values() for value in y if math.isfinite(value)]
    if not finite:
        return ""
    xs = [value for x, _ in thinned.values() for value in x]
    x0, x1, y0, y1 = min(xs), max(xs), min(finite), max(finite)
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + (abs(y0) or 1)

    def place(x: float, y: float) -> str:
        return (f"{LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT):.1f},"
                f"{HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM):.1f}")

    drawn, key = [], []
    for i, (name, (x, y)) in enumerate(thinned.items()):
        colour, dash = LINES[i % len(LINES)]
        stroke = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        for run in unbroken(x, y):
            points = " ".join(place(*point) for point in run)
            drawn.append(f'<polyline {stroke} points="{points}"/>' if len(run) > 1 else
                         f'<circle r="3" fill="{colour}" cx="{points.split(",")[0]}" cy="{points.split(",")[1]}"/>')
        key.append(f'<li><svg viewBox="0 0 32 10" aria-hidden="true"><path d="M0 5H32" {stroke}/></svg> '
                   f"{escape(name)}: {number(y[-1]) if math.isfinite(y[-1]) else y[-1]}</li>")
    axes = [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="currentColor"/>',
            f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(xlabel)}</text>']
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        x, y = place(x0 + share * (x1 - x0), y0 + share * (y1 - y0)).split(",")
        axes += [f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity="0.2"/>',
                 f'<text x="{x}" y="{HEIGHT - BOTTOM + 14}" text-anchor="{anchor}">'
                 f"{number(x0 + share * (x1 - x0))}</text>",
                 f'<text x="{LEFT - 4}" y="{float(y) + 4}" text-anchor="end">{number(y0 + share * (y1 - y0))}</text>']
    told = f"{title} over {xlabel}, from {number(y0)} to {number(y1)}; last: " + ", ".join(
        f"{name} {number(y[-1]) if math.isfinite(y[-1]) else y[-1]}" for name, (_, y) in thinned.items())
    return (f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(told)}">{"".join(axes + drawn)}</svg><ul class="key">{"".join(key)}</ul></figure>')


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return every n-th point, and the last one, so that no more than MOST_POINTS are left."""
    step = -(-len(x) // MOST_POINTS)
    chosen = sorted({*range(0, len(x), step), len(x) - 1})
    return [float(x[i]) for i in chosen], [float(y[i]) for i in chosen]


def unbroken(x: Sequence[float], y: Sequence[float]) -> list[list[tuple[float, float]]]:
    """Return the runs of finite points between values that are not."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in zip(x, y, strict=True):
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
