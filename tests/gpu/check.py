"""Prove on a GPU what can only be proved there: numbers, speed, waits, memory. Takes at most eight minutes.

    python tests/gpu/check.py                 # all parts; a JSON line after each
    python tests/gpu/check.py steps waits     # these parts
    python tests/gpu/check.py --null          # start every part on the null GPU, which shows no numbers

Parts run in a process of their own, which is started anew after one that fails or takes longer than its budget. The
exit status is 0 if no part failed; a part for which no time or no package is there says `left out`.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it starts without PYTHONPATH

from tests.gpu.checks.parts import PARTS  # noqa: E402

START = 15.0  # seconds that a worker may take to import what it needs, beside the budget of its part
NULL_STRETCH = 4  # a machine without a GPU may have few cores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which parts to do: {', '.join(PARTS)} [all]")
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together [480]")
    parser.add_argument("--null", action="store_true", help="on the null GPU: parts start, values are not compared")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]}: expected {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part, too
    waiting, failed = options.parts or list(PARTS), False
    until = time.monotonic() + options.seconds
    with TemporaryDirectory() as folder:
        while waiting:
            for line in work(waiting, Path(folder), until, options.null):
                print(json.dumps(line), flush=True)
                failed |= line.get("ok") is False
                if "ok" in line or "left out" in line:
                    waiting = [name for name in waiting if name != line["part"]]
    return int(failed)


def work(names: list[str], folder: Path, until: float, null: bool) -> Iterator[dict[str, Any]]:
    """Do parts in a new process until one breaks it; yield their lines. A part that is done has `ok` or `left out`."""
    process = start(names, folder, null)
    said: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=lambda: [*map(said.put, process.stdout), said.put(None)], daemon=True).start()
    part, begun, stretch = names[0], time.monotonic(), NULL_STRETCH if null else 1
    end = begun + START * stretch + PARTS[part].seconds * stretch
    try:
        while True:
            if part is None:
                return
            try:
                text = said.get(timeout=max(0.0, min(end, until) - time.monotonic()))
            except queue.Empty:
                late = time.monotonic() >= until
                yield {"part": part, **({"left out": "time"} if late else {
                    "ok": False, "error": f"not done within its {PARTS[part].seconds:g} s"})}
                if late:
                    yield from ({"part": name, "left out": "time"} for name in names[names.index(part) + 1:])
                return
            if text is None:
                yield {"part": part, "ok": False, "error": f"the process ended with status {process.wait()}"}
                return
            if not text.startswith('{"part"'):
                sys.stderr.write(text)
                continue
            line = json.loads(text)
            if "begins" in line:
                part, begun = line["part"], time.monotonic()
                end = begun + PARTS[part].seconds * stretch
                if until - begun < PARTS[part].seconds and not null:  # the rest may be shorter
                    yield {"part": part, "left out": "time"}
                    return
                continue
            yield {**line, **({"seconds": round(time.monotonic() - begun, 1)} if "ok" in line else {})}
            if line.get("ok") is False:
                return  # whatever broke it may have broken the GPU's context as well
            if "ok" in line or "left out" in line:
                later = names[names.index(part) + 1:]
                part = later[0] if later else None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
        process.wait()


def start(names: list[str], folder: Path, null: bool) -> subprocess.Popen:
    """Start a process that does the parts `names` one after the other."""
    command = [sys.executable, "-m", "tests.gpu.checks.worker", str(folder), *names]
    if null:
        skipped = ["--skip", "MetaSemi.core.training:evaluate=[0, 0, 0]"]
        command = [sys.executable, str(Path(__file__).with_name("nullgpu.py")), "--root", str(ROOT), *skipped,
                   str(Path(__file__).parent / "checks" / "worker.py"), *command[3:]]
    # TF32 would hide what differs between the two devices; a deterministic cuBLAS needs its workspace said.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NVIDIA_TF32_OVERRIDE": "0", "PYTHONUNBUFFERED": "1",
                   "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FEWLABEL_CACHE": str(folder / "cache"),
                   "FEWLABEL_NULL": "1" if null else ""}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment,
                            start_new_session=True)


if __name__ == "__main__":
    sys.exit(main())
