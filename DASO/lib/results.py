"""results.json, the published course of accuracies, and summary.json: last, median of the last 20 and best."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from DASO.lib.evaluation import summary
from shared.files import atomic


def write_results(folder: Path, state: Mapping[str, Any]) -> None:
    """Write both files from the run's state."""
    with atomic(folder / "results.json", "w") as file:
        json.dump(state["history"], file, indent=4, sort_keys=True)
    courses = {name: values for name, values in state["courses"].items() if values}
    if not courses:
        return
    numbers = {name: values for name, values in courses.items() if name.startswith(("valid/", "test/"))}
    labels = {name: values[-1] for name, values in courses.items() if name.startswith("pseudo_labels/")}
    content = {"iteration": courses["iteration"][-1], "accuracy": summary(numbers), "pseudo_labels": labels,
               "courses": courses}
    with atomic(folder / "summary.json", "w") as file:
        json.dump(content, file)
