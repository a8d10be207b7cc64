"""What the steps of a chain such as run_all.sh have left: JSON files, JSON lines, and the seconds of each step."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.cli import UserError

# Names of the accuracies in result.json -> what tables call them.
PROTOCOLS = {"best_on_test": "best on test", "median_of_last_20": "median of last 20", "last": "last",
             "best_on_validation": "best on validation"}


def read_json(path: Path, required: bool = False) -> dict[str, Any] | None:
    """Return the content of a JSON file; without one, None, or a UserError if it is `required`."""
    if not path.is_file():
        if required:
            raise UserError(f"{path} does not exist; run the step that writes it first")
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it and repeat the step that writes it") from None


def percent(accuracy: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracies of a result.json in % by protocol, without those that it does not have."""
    return {name: 100 * accuracy[key] for key, name in PROTOCOLS.items() if accuracy.get(key) is not None}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; a line cut short by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def seconds_by_step(history: Path) -> dict[str, float]:
    """Return the seconds of each command of a chain, over all its interruptions, until it first was complete.

    A step started anew by another command counts from there.
    """
    seconds: dict[str, float] = {}
    state: dict[str, tuple[str, bool]] = {}
    for entry in read_lines(history):
        name, command = entry["name"], entry["command"]
        known, done = state.get(name, ("", False))
        if command != known:
            seconds[name], done = 0.0, False
        if not done:
            seconds[name] += entry["seconds"]
        state[name] = (command, done or entry["status"] == 0)
    return seconds
