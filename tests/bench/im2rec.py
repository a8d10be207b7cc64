"""How long packing images without re-encoding takes, beside copying the same bytes with cp. Run it on a quiet machine.

    python -m tests.bench.im2rec [--images N] [--bytes B] [--repeats R] [--folder DIR]

Writes N files of B random bytes, as many as a hundredth of ImageNet by default, and times cp of their folder, cp of the
packed file, and im2rec.py --pass-through with one and two threads. Each as it is, and with the disk's share (`sync`
behind it; im2rec.py waits for the disk in any case, cp never); each with the files in memory (warm) and not (cold). All
take turns. Prints medians in seconds and how many times as long im2rec.py takes; exit status 1 where that is more than
BAR times cp of the folder in the same setting, or where the record file has other bytes than the files.
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
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from MetaSemi.imagenet.records import RecordFile

BAR = 2.0
IM2REC = [sys.executable, "-m", "MetaSemi.imagenet.im2rec"]
FOLDER, PACKED, OURS = "cp -r of the folder", "cp of the packed file", "im2rec.py, {} thread(s)"


def make(folder: Path, images: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(images):
        place = folder / f"n{number % 100:08d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.JPEG").write_bytes(rng.bytes(size + number % 1000))


def run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def forget(path: Path) -> None:
    """Drop a flushed file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def check(root: Path) -> None:
    """Compare the packed file with the images, one for one."""
    records = RecordFile(root / "x.rec")
    for number, line in enumerate((root / "x.lst").read_text().splitlines()):
        if records.read(number).payload != (root / "images" / line.split("\t")[-1]).read_bytes():
            sys.exit(f"record {number} has other bytes than its file")


def measure(root: Path, repeats: int) -> dict[tuple[str, str, str], float]:
    """Return the median seconds by (task, warm or cold, alone or sync)."""
    images = sorted((root / "images").rglob("*.JPEG"))
    tasks: dict[str, Callable[[], None]] = {
        FOLDER: lambda: run("cp", "-r", root / "images", root / "copy"),
        PACKED: lambda: run("cp", root / "whole.rec", root / "copy.rec"),
        **{OURS.format(threads): lambda threads=threads: run(
            *IM2REC, root / "x", root / "images", "--pass-through", "--pack-label", "--num-thread", str(threads))
           for threads in (1, 2)}}
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(repeats):
        for cache in ("warm", "cold"):
            for flushed in ("alone", "sync"):
                for name, task in tasks.items():
                    shutil.rmtree(root / "copy", ignore_errors=True)
                    for left in ("copy.rec", "x.rec", "x.idx"):
                        (root / left).unlink(missing_ok=True)
                    os.sync()
                    for path in (*images, root / "whole.rec"):
                        if cache == "cold":
                            forget(path)
                        else:
                            path.read_bytes()
                    started = time.perf_counter()
                    task()
                    if flushed == "sync":
                        os.sync()
                    found[name, cache, flushed].append(time.perf_counter() - started)
    return {key: statistics.median(values) for key, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=12811)
    parser.add_argument("--bytes", type=int, default=110_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to write (default: the folder for temporary files)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        make(root / "images", options.images, options.bytes)
        run(*IM2REC, root / "x", root / "images", "--recursive", "--list")
        run(*IM2REC, root / "x", root / "images", "--pass-through", "--pack-label")
        check(root)
        os.replace(root / "x.rec", root / "whole.rec")
        print(f"{options.images} files, {(root / 'whole.rec').stat().st_size / 1e6:.0f} MB", flush=True)
        found = measure(root, options.repeats)
    missed = False
    for cache in ("warm", "cold"):
        for flushed in ("alone", "sync"):
            copies = {name: found[name, cache, flushed] for name in (FOLDER, PACKED)}
            print(f"{cache}, {flushed}: " + ", ".join(f"{name} {value:.2f} s" for name, value in copies.items()))
            for threads in (1, 2):
                name = OURS.format(threads)
                ours = found[name, cache, flushed]
                print(f"    {name} {ours:.2f} s: " + ", ".join(
                    f"{ours / value:.2f} times {copy}" for copy, value in copies.items()))
                missed |= ours > BAR * copies[FOLDER]
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
