"""Pictures of a report: image grids, curves, heat maps, confusion matrices, as PNG files; charts for a page, as SVG."""
from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shared.training.files import atomic

# Above this many classes the counts inside the cells and the class names become unreadable and are left out.
READABLE_CLASSES = 20
LINE_STYLES = ("-", "--", ":", "-.", (0, (12, 4)), (0, (4, 2)), (0, (1, 2)))  # told apart without colours too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's palette
STYLES = cycler(linestyle=LINE_STYLES) + cycler(color=COLOURS)


def image_grid(rows: Mapping[str, np.ndarray], path: str | os.PathLike, title: str = "",
               scale: int | None = None, beside: Mapping[str, np.ndarray] | None = None) -> None:
    """Write one row of images per entry of `rows`: label -> uint8 [n, C, H, W] with C = 1 or 3; rows may differ in n.

    scale: screen pixels per image pixel (nearest neighbour, so that pixels stay visible); None: about 48 per image.
    beside: further images by label, on the right of those behind a gap.
    """
    beside = {name: images for name, images in (beside or {}).items() if name in rows}
    shapes = {images.shape[1:] for images in (*rows.values(), *beside.values()) if len(images)}
    if len(shapes) != 1:
        raise ValueError(f"expected images of one shape, got {sorted(shapes)}")
    channels, height, width = shapes.pop()
    scale = scale or max(1, round(48 / height))
    columns = max(len(images) for images in rows.values())
    gap = 2
    right = columns * (width * scale + gap) + 10  # where those beside begin
    size = len(rows) * (height * scale + gap) - gap, right - 10 - gap, 3
    if beside:
        size = size[0], right + max(map(len, beside.values())) * (width * scale + gap) - gap, 3
    canvas = np.full(size, 255, np.uint8)
    for r, name in enumerate(rows):
        for start, images in ((0, rows[name]), (right, beside.get(name, ()))):
            for c, image in enumerate(images):
                pixels = np.broadcast_to(image, (3, height, width)).transpose(1, 2, 0)
                top, left = r * (height * scale + gap), start + c * (width * scale + gap)
                canvas[top:top + height * scale, left:left + width * scale] = pixels.repeat(scale, 0).repeat(scale, 1)
    names = [str(name) for name in rows]
    margin = 0.1 * max(len(name) for name in names) + 0.3  # inches
    figure = Figure((canvas.shape[1] / 100 + margin, canvas.shape[0] / 100 + (0.4 if title else 0.1)))
    inches = figure.get_size_inches()
    axes = figure.add_axes((margin / inches[0], 0.05 / inches[1],
                            canvas.shape[1] / 100 / inches[0], canvas.shape[0] / 100 / inches[1]))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_yticks([r * (height * scale + gap) + height * scale / 2 for r in range(len(names))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10)
    _save(figure, path)


@dataclass(frozen=True)
class Panel:
    """One chart of `curves`. lines: name -> (x, y); values that are not finite leave gaps.

    xlabel, ylabel: quantity and unit. percent: y is a fraction from 0 to 1, drawn from 0 to 100 %. log_x:
    logarithmic x axis.
    """

    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    xlabel: str = ""
    ylabel: str = ""
    percent: bool = False
    log_x: bool = False


def curves(panels: Mapping[str, Panel], path: str | os.PathLike) -> None:
    """Write charts side by side: title -> Panel."""
    figure = Figure((4.2 * max(1, len(panels)), 3.2))
    for position, (title, panel) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        axes.set_prop_cycle(STYLES)
        steps = [value for x, _ in panel.lines.values() for value in x]
        for name, (x, y) in panel.lines.items():
            y = 100 * np.asarray(y, float) if panel.percent else y
            axes.plot(x, y, label=name, marker="." if len(x) < 30 else None, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(panel.xlabel, fontsize=9)
        axes.set_ylabel(panel.ylabel, fontsize=9)
        axes.grid(alpha=0.3)
        if panel.percent:
            axes.set_ylim(-2, 102)
        if panel.log_x:
            axes.set_xscale("log")
        elif all(value == int(value) for value in steps):
            axes.margins(x=0.05 if len(set(steps)) > 1 else 20)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
        if len(panel.lines) > len(COLOURS):
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        elif panel.lines:
            axes.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def confusion_matrices(matrices: Mapping[str, np.ndarray], classes: Sequence[str], path: str | os.PathLike,
                       labels: tuple[str, str] = ("true", "predicted")) -> None:
    """Write confusion matrices side by side: title -> int counts [C, C], row = true class, column = predicted class.

    labels: names of the rows and of the columns.

    The colour is the fraction of the row (true class); the text in a cell is the count.
    """
    names = [str(name) for name in classes]
    size = min(12.0, max(3.2, 0.38 * len(names)))
    figure = Figure(((size + 0.8) * len(matrices), size + 0.9))
    for position, (title, counts) in enumerate(matrices.items(), start=1):
        counts = np.asarray(counts)
        if counts.shape != (len(names), len(names)):
            raise ValueError(f"{title}: expected counts for {len(names)} classes, got shape {counts.shape}")
        fraction = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes = figure.add_subplot(1, len(matrices), position)
        axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(labels[1], fontsize=9)
        axes.set_ylabel(labels[0], fontsize=9)
        if len(names) > READABLE_CLASSES:
            continue
        rotation = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=rotation)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if fraction[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    figure.tight_layout()
    _save(figure, path)


def dots(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float | None] | None]]], series: Sequence[str],
         path: str | os.PathLike, xlabel: str, title: str = "") -> None:
    """Write panels: panel title -> row name -> one (mean, deviation or None) or None per name in `series`.

    Rows stand below each other, their values on one axis; a row without a value stays, empty. Four panels side by side
    at most; where all have the same rows, those are named once.
    """
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    rows = max(len(lines) for lines in panels.values())
    alike = len({tuple(lines) for lines in panels.values()}) == 1
    names = 0.08 * max(len(str(name)) for lines in panels.values() for name in lines)  # inches
    figure = Figure((2.6 * across + names * (1 if alike else across) + 0.4, (1.1 + 0.28 * rows) * down + 0.7),
                    layout="constrained")
    shown = {}
    for position, (panel, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, position)
        for i, (name, marker) in enumerate(zip(series, "os^", strict=False)):
            points = [(place, mean, np.nan if deviation is None else deviation)  # without a deviation no bar
                      for place, values in enumerate(lines.values()) if values[i] is not None
                      for mean, deviation in [values[i]]]
            if not points:
                continue
            shift = 0.22 * (i - (len(series) - 1) / 2)
            shown[name] = axes.errorbar(
                [mean for _, mean, _ in points], [place + shift for place, _, _ in points], color=COLOURS[i],
                xerr=[deviation for _, _, deviation in points], linestyle="none", marker=marker, markersize=5,
                fillstyle="none" if i else "full", capsize=2)
        named = not alike or position % across == 1 or across == 1
        axes.set_yticks(range(len(lines)), [str(name) if named else "" for name in lines], fontsize=8)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(panel, fontsize=9)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.legend(shown.values(), shown, fontsize=8, loc="outside lower center", ncols=len(series), frameon=False,
                  title=textwrap.fill(xlabel, round(13 * figure.get_figwidth())), title_fontsize=8)
    _save(figure, path)


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], path: str | os.PathLike, *,
             title: str = "", xlabel: str = "", ylabel: str = "", unit: str = "") -> None:
    """Write a table of numbers [rows, columns] as colours with the number in each cell; not finite: an empty cell.

    unit: of the numbers, beside the colours.
    """
    values = np.asarray(values, np.float64)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"expected values [{len(rows)}, {len(columns)}], got {list(values.shape)}")
    figure = Figure((1.8 + 0.62 * len(columns), 1.3 + 0.42 * len(rows)))
    axes = figure.add_subplot(1, 1, 1)
    drawn = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto")
    figure.colorbar(drawn, ax=axes, fraction=0.03, label=unit)
    low, high = drawn.get_clim()
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = value < low + 0.6 * (high - low)
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=90 if max(map(len, columns)) > 6 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_title(textwrap.fill(title, round(10 * figure.get_figwidth())), fontsize=10)
    figure.tight_layout()
    _save(figure, path)


def svg_chart(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, xlabel: str) -> str:
    """Return a line chart as SVG: line name -> (x, y); values that are not finite leave gaps."""
    figure = Figure((4.2, 2.8 + 0.17 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, linestyle=LINE_STYLES[number % 7], color=COLOURS[number % 7], label=f"{name}: {y[-1]:.4g}",
                  marker="." if len(x) < 3 else None)
    axes.set(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fewlabel"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with atomic(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
