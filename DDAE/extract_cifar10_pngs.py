"""Unpack CIFAR-10's 50,000 training images, in their order, to PNG files for `python -m pytorch_fid`.

    python extract_cifar10_pngs.py

writes data/cifar10-pngs/00000.png ... 49999.png. EDM/fid.py and fid.py need no such files.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from shared import cli
from shared.cli import Flag, Option, Text, UserError, run_main
from shared.data.datasets import load_dataset
from shared.data.writers import PngWriter
from shared.training.files import make_dir
from shared.training.progress import progress

EACH = 5000  # images of a class in the published set
FLAGS = (
    Option("--data_dir", Text, "./data", "folder of CIFAR-10", metavar="DIR"),
    Option("--dest", Text, None, "folder of the PNG files", default_help="cifar10-pngs in --data_dir", metavar="DIR"),
    Option("--download", Flag, False, "fetch CIFAR-10 if it is missing"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    images = load_dataset("cifar10", "train", options.data_dir, download=options.download)
    counts = np.bincount(images.labels, minlength=10)
    if set(counts.tolist()) != {EACH}:
        raise UserError(f"{options.data_dir}: expected {EACH} images of each class, found {counts.min()} to "
                        f"{counts.max()}; it is not the whole training set")
    folder = make_dir(options.dest or Path(options.data_dir) / "cifar10-pngs")
    with PngWriter() as writer:
        for start in progress(range(0, len(images), 500), "writing", unit="x 500 images"):
            writer.save((folder / f"{number:05d}.png", np.array(images.images[number]))
                        for number in range(start, min(start + 500, len(images))))
    print(f"{len(images)} images in {folder}")


if __name__ == "__main__":
    run_main(main)
