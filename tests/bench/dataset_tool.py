"""How much quicker the converter is on all cores than the way it was, and a second read than decoding.

    python tests/bench/dataset_tool.py [--images N] [--source cifar-10-python.tar.gz]

Converts an archive of random 32x32 images (or the real one) as the original does, one process, Pillow and zipfile image
by image, and with dataset_tool.py; then reads the result twice. Prints seconds and ratios.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from EDM.dataset_tool import convert
from shared.data.images import read_images
from shared.parallel import cores
from tests.golden.data_sources import write_cifar_archive


def plain_convert(source: Path, dest: Path) -> None:
    """The way of the original: everything in one process, one image after the other."""
    images, labels = [], []
    with tarfile.open(source) as archive:
        for k in range(1, 6):
            batch = pickle.load(archive.extractfile(f"cifar-10-batches-py/data_batch_{k}"), encoding="latin1")
            images.append(batch["data"].reshape(-1, 3, 32, 32))
            labels.append(batch["labels"])
    images, labels = np.concatenate(images).transpose(0, 2, 3, 1), np.concatenate(labels)
    listed = []
    with zipfile.ZipFile(dest, "w", zipfile.ZIP_STORED) as archive:
        for index, image in enumerate(images):
            name = f"{index:08d}"
            name, stream = f"{name[:5]}/img{name}.png", io.BytesIO()
            Image.fromarray(image).save(stream, format="png", compress_level=0, optimize=False)
            archive.writestr(name, stream.getvalue())
            listed.append([name, int(labels[index])])
        archive.writestr("dataset.json", json.dumps({"labels": listed}))


def decode_all(path: Path) -> int:
    """Decode every PNG of a ZIP, as a data loader does in its first epoch."""
    total = 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".png"):
                total += int(np.asarray(Image.open(io.BytesIO(archive.read(name)))).sum())
    return total


def read_all(path: Path) -> int:
    """Open the set from the cache and copy all of it into memory."""
    return len(np.array(read_images(path).images))


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest of a few runs."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--source", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEWLABEL_CACHE"] = f"{folder}/cache"
        source = args.source or Path(folder) / "cifar-10-python.tar.gz"
        if args.source is None:
            rng = np.random.default_rng(0)
            # Smooth images, about as hard to pack as photographs.
            rows = np.cumsum(rng.integers(-9, 10, (args.images, 3072), np.int8), axis=1, dtype=np.uint8)
            write_cifar_archive(source, rows, (np.arange(args.images) % 10).tolist())
        plain = seconds(lambda: plain_convert(source, Path(folder) / "plain.zip"))
        ours = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(ours)})
        single = seconds(lambda: convert(source, Path(folder) / "tool.zip"))
        os.sched_setaffinity(0, ours)
        tool = seconds(lambda: convert(source, Path(folder) / "tool.zip"))
        print(f"convert: original way {plain:.2f} s, dataset_tool.py {single:.2f} s on one core, {tool:.2f} s on "
              f"{cores()}: {plain / tool:.2f} times the original, {single / tool:.2f} times one core")
        decoding = seconds(lambda: decode_all(Path(folder) / "tool.zip"), 2)
        first = seconds(lambda: read_all(Path(folder) / "tool.zip"), 1)
        again = seconds(lambda: read_all(Path(folder) / "tool.zip"))
        print(f"read: decoding the PNGs {decoding:.2f} s, first read {first:.2f} s, second read {again * 1e3:.0f} ms: "
              f"{decoding / again:.0f} times")


if __name__ == "__main__":
    main()
