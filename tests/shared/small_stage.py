"""One stage of the runs of small_tables.py: `python -m tests.shared.small_stage NAME FOLDER METHOD VALUE SEED`."""
from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from shared.training.files import lock


def compute(name: str, folder: Path, method: str, value: float) -> None:
    """Do one stage: slow where the file `slow` stands beside the table, failing where `fail-<method>` does, without a
    result where `lose-<method>` does."""
    base = folder.parents[2]
    while (base / "slow").exists() and name == "second":
        time.sleep(0.05)
    if (base / f"fail-{method}").exists():
        print("error: asked to fail", file=sys.stderr)
        sys.exit(2)
    with lock(folder), open(base / "calls.txt", "a") as file:  # as trainers lock the folder they write into
        file.write(f"{name} {method} {folder.name}\n")
    if name == "second" and not (base / f"lose-{method}").exists():
        (folder / "value.json").write_text(json.dumps(value))


if __name__ == "__main__":
    compute(sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]) + int(sys.argv[5]))
