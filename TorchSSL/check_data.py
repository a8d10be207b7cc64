"""Check a data set before training: classes, counts, sizes, duplicates between training, test and unlabelled images.

    python check_data.py --dataset=cifar10 --download
    python check_data.py --dataset=/path/to/images
    bash ../run_all.sh --dry-run --stage3-args=--lr=0.01 | python check_data.py --commands

`--dataset` is that of the trainers: a name, or the path of your own images.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace

from shared import cli
from shared.cli import Flag, Option, Text, run_main
from shared.data.datasets import has_split, load_dataset
from TorchSSL.core.data import report
from TorchSSL.core.plan import check_experiment

FLAGS = (
    Option("--dataset -ds", Text, "cifar10", "name of a data set, or a path"),
    Option("--data_dir", Text, "./data", "folder of the data sets"),
    Option("--download", Flag, False, "fetch a published data set missing in --data_dir"),
    Option("--commands", Flag, False, "read the commands of an experiment from standard input and check all that can "
           "be known before the first one; run nothing"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    if options.commands:
        check_experiment(sys.stdin)
        return
    splits = ["train", "test"] + ["unlabeled"] * has_split(options.dataset, "unlabeled")
    parts = [load_dataset(options.dataset, split, options.data_dir, options.download) for split in splits]
    if options.dataset == "svhn":  # stage 1 reads it, too: fetched now rather than in the middle of the experiment
        load_dataset(options.dataset, "extra", options.data_dir, options.download)
    print(report(*parts))


if __name__ == "__main__":
    run_main(main)
