"""Draw recall and precision of pseudo-labels and test accuracy, class by class (the paper's Figure 2), of some runs.

    python -m DASO.plot_pseudo_labels outputs/cifar10/fixmatch/FixMatch_* outputs/cifar10/fixmatch/DASO_*

Each RUN is a run's folder; classes stand in the order of their labelled images, the most frequent one first.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.cli import Choice, Option, UserError, parse, run_main
from shared.report.plots import Panel, curves
from shared.training.files import check_writable

PANELS = {"recall": "Recall of pseudo-labels", "precision": "Precision of pseudo-labels", "accuracy": "Test accuracy"}
FLAGS = (
    Option("runs", many=True, required=True, help="a run's folder, which holds summary.json", metavar="RUN"),
    Option("--out", default="pseudo_labels.png", help="the figure", metavar="PNG"),
    Option("--kind", Choice("main", "linear", "semantic"), "main",
           "kind of DASO's pseudo-labels; main: the learned ones"),
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    check_writable(options.out, "--out")
    runs = {Path(run).resolve().name: read_run(Path(run), options.kind) for run in options.runs}
    panels = {title: Panel({run: (range(len(values[name])), values[name]) for run, values in runs.items()
                            if name in values}, "class, most frequent first", "%", percent=True)
              for name, title in PANELS.items()}
    curves(panels, options.out)
    print(f"{options.out}: {', '.join(runs)}")


def read_run(folder: Path, kind: str) -> dict[str, list[float]]:
    """Return a run's newest fractions by class: recall, precision (where known) and accuracy. UserError."""
    file = folder / "summary.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        split = "test" if "test/classes" in content["accuracy"] else "valid"
        accuracy = content["accuracy"][f"{split}/classes"]["median20"]
        values = {"accuracy": [value / 100 for value in as_numbers(accuracy)]}
        for name in ("recall", "precision"):
            if f"pseudo_labels/{kind}/{name}" in content["pseudo_labels"]:
                values[name] = as_numbers(content["pseudo_labels"][f"pseudo_labels/{kind}/{name}"])
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name the folder of a run that has been evaluated"
                        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not the summary of a run of main.py") from None
    return values


def as_numbers(values: Sequence[Any]) -> list[float]:
    """Return values by class with NaN, which leaves a gap, for unknown ones (None or negative)."""
    return [float("nan") if value is None or value < 0 else value for value in values]


if __name__ == "__main__":
    run_main(main)
