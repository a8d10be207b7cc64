"""Draw recall and precision of pseudo-labels and test accuracy, class by class (the paper's Figure 2), of some runs.

    python -m DASO.plot_pseudo_labels outputs/cifar10/fixmatch/FixMatch_* outputs/cifar10/fixmatch/DASO_*

Each RUN is a run's folder; classes stand in the order of their labelled images, the most frequent one first.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.cli import Parser, UserError, run_main

PANELS = ("Recall of pseudo-labels", "Precision of pseudo-labels", "Test accuracy")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, which holds summary.json")
    parser.add_argument("--out", default="pseudo_labels.png", metavar="PNG", help="the figure (default: %(default)s)")
    parser.add_argument("--kind", choices=("main", "linear", "semantic"), default="main",
                        help="which of DASO's pseudo-labels (default: main, those that are learned)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    curves = [read_run(Path(run), options.kind) for run in options.runs]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8))
    for axis, title, name in zip(axes, PANELS, ("recall", "precision", "accuracy"), strict=True):
        for label, values in curves:
            numbers = [float("nan") if value is None or value < 0 else value for value in values.get(name, [])]
            if numbers:
                axis.plot(range(len(numbers)), numbers, marker="o", label=label)
        top = 100 if name == "accuracy" else 1
        axis.set(title=title, xlabel="class, most frequent first", ylim=(-.02 * top, 1.02 * top))
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(options.out, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {options.out}: cannot be written ({error})") from None
    pyplot.close(figure)
    print(f"{options.out}: {', '.join(label for label, _ in curves)}")


def read_run(folder: Path, kind: str) -> tuple[str, dict[str, list[Any]]]:
    """Return a run's name and its newest numbers by class: recall and precision (where known), accuracy. UserError."""
    file = folder / "summary.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        accuracy = content["accuracy"]
        split = "test" if "test/classes" in accuracy else "valid"
        values = {"accuracy": accuracy[f"{split}/classes"]["median20"]}
        labels = content["pseudo_labels"]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name the folder of a run that has been evaluated"
                        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not the summary of a run of main.py") from None
    for name in ("recall", "precision"):
        if f"pseudo_labels/{kind}/{name}" in labels:
            values[name] = labels[f"pseudo_labels/{kind}/{name}"]
    return folder.resolve().name.split("_seed_")[0], values


if __name__ == "__main__":
    run_main(main)
