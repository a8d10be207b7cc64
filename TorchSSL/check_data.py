"""Look at a data set before training: classes, counts, sizes, duplicates between training and test images.

    python check_data.py --dataset=cifar10 --download
    python check_data.py --dataset=/path/to/images

`--dataset` takes what the trainers take: a name, or the path of your own images.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from shared.cli import Parser, run_main


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", "-ds", default="cifar10", help="name of a data set, or a path [%(default)s]")
    parser.add_argument("--data_dir", default="./data", help="folder of the data sets [%(default)s]")
    parser.add_argument("--download", action="store_true", help="fetch a published data set that is not in --data_dir")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    from shared.data.datasets import load_dataset, report

    parts = [load_dataset(options.dataset, split, options.data_dir, options.download) for split in ("train", "test")]
    # What stage 1 reads beside them, fetched now rather than in the middle of the experiment.
    for name, split in (("svhn", "extra"), ("stl10", "unlabeled")):
        if options.dataset == name:
            load_dataset(name, split, options.data_dir, options.download)
    print(report(*parts))


if __name__ == "__main__":
    run_main(main)
