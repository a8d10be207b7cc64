"""Write folders of pseudo-labelled real images for `--aug_path`: a control for stage 3 of DPT.

    python pseudo_folder.py --dataset=digits --labels=./saved_models/freematch_digits_10_1/pseudo_label.npy \\
        --dest=./data-aug/freematch_digits_10_1 --per_class=101

Writes <dest>/real_all, every training image under its pseudo-label, and <dest>/real_balanced, the same number of every
class, drawn with --seed; a class with fewer repeats them. If stage 3 gains as much from these as from generated images,
the gain is not due to generation.
"""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from shared.cli import Flag, Int, Option, Text, UserError, parse, run_main
from shared.data.classes import class_balanced_draw
from shared.data.images import ImageSet
from shared.data.writers import write_folder
from shared.training.record import Record
from TorchSSL.core.data import load_pools
from TorchSSL.core.labels import read_pseudo_labels

FLAGS = (
    Option("--dataset -ds", Text, "cifar10", "name of a data set, or a path"),
    Option("--data_dir", Text, "./data", "folder of the data sets"),
    Option("--labels", Text, required=True, help="the pseudo_label.npy of get_labels.py"),
    Option("--dest", Text, required=True, help="folder for real_all/ and real_balanced/"),
    Option("--per_class", Int(1), 1001, "images of every class in real_balanced"),
    Option("--seed", Int(0), 1, "seed of the draw"),
    Option("--overwrite", Flag, False, "replace folders of other images or pseudo-labels"),
)


def main() -> None:
    options = parse(__doc__, FLAGS)
    images = load_pools(options.dataset, options.data_dir, download=False)[0]
    labels = read_pseudo_labels(options.labels, "--labels")
    if len(labels) != len(images):
        raise UserError(f"--labels: {options.labels} holds {len(labels)} labels, {options.dataset} has {len(images)} "
                        "training images; give the pseudo_label.npy of that data set")
    pseudo = ImageSet(images.images, labels, images.classes, images.name)
    balanced = class_balanced_draw(labels, options.per_class, options.seed)
    dest, inputs = Path(options.dest), {"--dataset": images, "--labels": options.labels}
    parts = ((Record(dest / "real_all", {}, inputs), pseudo),
             (Record(dest / "real_balanced", {"per_class": options.per_class, "seed": options.seed}, inputs),
              pseudo.subset(balanced)))
    missing = [part for part in parts if not part[0].is_complete(options.overwrite)]
    for record, chosen in missing:
        folder = record.output
        if folder.exists():
            shutil.rmtree(folder)
        write_folder(chosen, folder)
        record.write()
        print(f"{folder}: {len(chosen)} images, per class {np.bincount(chosen.labels).tolist()}")


if __name__ == "__main__":
    run_main(main)
