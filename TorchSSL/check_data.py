"""Look at a data set before training: classes, counts, sizes, duplicates between training and test images.

    python check_data.py --dataset=cifar10 --download
    python check_data.py --dataset=/path/to/images
    bash ../run_all.sh --dry-run --stage3-args=--lr=0.01 | python check_data.py --commands

`--dataset` takes what the trainers take: a name, or the path of your own images.
"""
from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

from shared import cli
from shared.cli import Flag, Option, Text, UserError, run_main
from shared.data.datasets import load_dataset
from TorchSSL.core.data import report

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    Option("--dataset -ds", Text, "cifar10", "name of a data set, or a path"),
    Option("--data_dir", Text, "./data", "folder of the data sets"),
    Option("--download", Flag, False, "fetch a published data set that is not in --data_dir"),
    Option("--commands", Flag, False, "read commands from standard input and only check their flags, run nothing"),
)
# What stage 1 reads beside the training and test images, fetched now rather than in the middle of the experiment.
MORE_SPLITS = {"svhn": "extra", "stl10": "unlabeled"}


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    if options.commands:
        check_commands(sys.stdin)
        return
    parts = [load_dataset(options.dataset, split, options.data_dir, options.download) for split in ("train", "test")]
    if options.dataset in MORE_SPLITS:
        load_dataset(options.dataset, MORE_SPLITS[options.dataset], options.data_dir, options.download)
    print(report(*parts))


def check_commands(lines: Iterable[str]) -> None:
    """Let each script read its flags, in its folder, as `run_all.sh --dry-run` prints them. Raises UserError."""
    folder = ROOT
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["cd"]:
            folder = (folder / words[1]).resolve()
            continue
        position = next((i for i, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
        if position is None:
            continue
        script, flags = words[position], words[position + 1:]
        if script == "generate.sh":
            last, images, snapshot, _, *flags = flags
            script, flags = "generate.py", [f"--seeds=0-{last}", f"--outdir={images}", f"--network={snapshot}", *flags]
        if ">>" in flags:
            flags = flags[:flags.index(">>")]
        os.chdir(folder)
        module = importlib.import_module(f"{folder.name}.{Path(script).stem}")
        read = getattr(module, "parse", None)
        try:
            if read is cli.parse:
                cli.parse(module.__doc__, module.FLAGS, flags)
            elif read is not None:
                read(flags)
        except UserError as error:
            raise UserError(f"{script}: {error}") from None


if __name__ == "__main__":
    run_main(main)
