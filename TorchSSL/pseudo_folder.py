"""Folders of pseudo-labelled real images, as `--aug_path` takes them: a control for stage 3 of DPT.

    python pseudo_folder.py --dataset=digits --labels=./saved_models/freematch_digits_10_1/pseudo_label.npy \\
        --dest=./data-aug/freematch_digits_10_1 --per_class=101

Writes <dest>/real_all, every training image under its pseudo-label, and <dest>/real_balanced, the same number of every
class, drawn with --seed; a class that has fewer repeats them. If stage 3 gains as much from these as from generated
images, the gain is not due to the generation.
"""
from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence

from shared.cli import Parser, UserError, run_main


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", "-ds", default="cifar10", help="name of a data set, or a path [%(default)s]")
    parser.add_argument("--data_dir", default="./data", help="folder of the data sets [%(default)s]")
    parser.add_argument("--labels", required=True, help="the pseudo_label.npy of get_labels.py")
    parser.add_argument("--dest", required=True, help="folder for real_all/ and real_balanced/")
    parser.add_argument("--per_class", type=int, default=1001, help="images of every class in real_balanced "
                        "[%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of the draw [%(default)s]")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    from pathlib import Path

    import numpy as np

    from shared.data.images import ImageSet
    from shared.data.pickles import load_array
    from shared.data.splits import class_balanced_draw
    from shared.data.writers import write_folder
    from TorchSSL.core.data import load_pools

    images = load_pools(options.dataset, options.data_dir, download=False)[0]
    labels = load_array(options.labels, f"--labels {options.labels}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(f"--labels: {options.labels} holds {labels.size} labels, {options.dataset} has {len(images)} "
                        "training images; give the pseudo_label.npy of that data set")
    pseudo = ImageSet(images.images, labels.astype(np.int64), images.classes, images.name)
    even = class_balanced_draw(labels, options.per_class, options.seed)
    for name, chosen in (("real_all", pseudo), ("real_balanced", pseudo.subset(even))):
        folder = Path(options.dest) / name
        if folder.exists():
            shutil.rmtree(folder)
        write_folder(chosen, folder)
        print(f"{folder}: {len(chosen)} images, per class {np.bincount(chosen.labels).tolist()}")


if __name__ == "__main__":
    run_main(main)
