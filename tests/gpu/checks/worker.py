"""Does parts of tests/gpu/check.py in this process, and prints a JSON line for each:

    python -m tests.gpu.checks.worker FOLDER PART...
"""
from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.gpu.checks.parts import PARTS


@dataclass(frozen=True)
class Place:
    """Where a part works: `folder` is its own. null: on the null GPU, where values mean nothing."""

    name: str
    folder: Path
    null: bool

    def report(self, **values: Any) -> None:
        """Print a line now, which stays even if the part fails later."""
        print(json.dumps({"part": self.name, **values}), file=sys.__stdout__, flush=True)

    def check(self, holds: bool, message: str) -> None:
        """Fail unless `holds`, where values mean something."""
        if not holds and not self.null:
            raise AssertionError(message)


class LeftOut(Exception):
    """A part that cannot be done here; says why."""


def do(name: str, folder: Path) -> bool:
    """Do a part and print its lines; return whether it did not fail."""
    part, null = PARTS[name], bool(os.environ.get("FEWLABEL_NULL"))
    folder = folder / f"{name} {os.getpid()}"
    folder.mkdir()
    place = Place(name, folder, null)
    print(json.dumps({"part": name, "begins": True}), flush=True)
    missing = [package for package in part.needs if not is_there(package)]
    if missing:
        place.report(**{"left out": f"{', '.join(missing)} is not installed"})
        return True
    note = {"null GPU": part.null} if null and part.null else {}
    try:
        if not torch.cuda.is_available():
            raise LeftOut("no GPU")
        with contextlib.redirect_stdout(sys.stderr):  # what the programs say is not a result
            found = getattr(importlib.import_module(f"tests.gpu.checks.{part.module}"), name)(place)
    except LeftOut as reason:
        place.report(**{"left out": str(reason)})
    except Exception as error:  # noqa: BLE001 - one part must not end the others
        traceback.print_exc()
        place.report(ok=False, error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", **note)
        return False
    else:
        place.report(ok=True, **(found or {}), **note)
    torch.cuda.empty_cache()
    return True


def is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


if __name__ == "__main__":
    # As a module of its own, so that the parts see the same classes.
    from tests.gpu.checks import worker

    for wanted in sys.argv[2:]:
        if not worker.do(wanted, Path(sys.argv[1])):
            break
