"""How long packing images without re-encoding takes, beside copying the same bytes with cp.

    python tests/bench/im2rec.py [--images N] [--bytes B] [--repeats R] [--folder DIR]

Writes N files of B random bytes, as many as a hundredth of ImageNet by default, and times: cp of the folder, cp of the
packed file, and im2rec.py --pass-through with all its start-up and with its data flushed to the disk (cp leaves that
undone; `sync` says what it costs). Prints medians in seconds and ratios; the bound is 2.
"""
from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

IM2REC = [sys.executable, "-m", "MetaSemi.imagenet.im2rec"]


def make(folder: Path, images: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(images):
        place = folder / f"n{number % 100:08d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.JPEG").write_bytes(rng.bytes(size + number % 1000))


def seconds(call: Callable[[], object], clean: Callable[[], object]) -> float:
    clean()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=12811)
    parser.add_argument("--bytes", type=int, default=110_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to write (default: the folder for temporary files)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        make(root / "images", options.images, options.bytes)

        def run(*command: str | Path) -> None:
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)

        def clean() -> None:
            shutil.rmtree(root / "copy", ignore_errors=True)
            for path in (root / "copy.rec", root / "x.rec", root / "x.idx"):
                path.unlink(missing_ok=True)
            os.sync()

        run(*IM2REC, root / "x", root / "images", "--recursive", "--list")
        tasks = {
            "cp of the folder": lambda: run("cp", "-r", root / "images", root / "copy"),
            "cp of the folder, sync": lambda: (run("cp", "-r", root / "images", root / "copy"), os.sync()),
            "im2rec.py --pass-through": lambda: run(*IM2REC, root / "x", root / "images", "--pass-through",
                                                    "--pack-label"),
        }
        found = {name: statistics.median(seconds(task, clean) for _ in range(options.repeats))
                 for name, task in tasks.items()}
        whole = root / "whole.rec"  # the last task has left it
        os.replace(root / "x.rec", whole)
        found["cp of the packed file"] = statistics.median(
            seconds(lambda: run("cp", whole, root / "copy.rec"), clean) for _ in range(options.repeats))
        ours = found["im2rec.py --pass-through"]
        print(f"{options.images} files, {whole.stat().st_size / 1e6:.0f} MB")
        for name, value in found.items():
            print(f"{name:26s} {value:8.3f} s   im2rec.py takes {ours / value:.2f} times as long")


if __name__ == "__main__":
    main()
