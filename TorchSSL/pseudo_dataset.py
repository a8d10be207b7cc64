"""A data set with pseudo-labels in place of the true ones (stage 1c of DPT).

    python pseudo_dataset.py --data_path ./data/cifar-10-batches-py --save_path ./saved_models/freematch_cifar10_40_1
    python pseudo_dataset.py --dataset=svhn --save_path ./saved_models/freematch_svhn_40_1

Reads <save_path>/pseudo_label.npy, which get_labels.py wrote. For CIFAR-10 writes the published form,
<save_path>/cifar-10-batches-py/data_batch_1 to 5 and <save_path>/cifar-10-python.tar.gz; for any other data set
<save_path>/<name of that folder>-pseudo.npz with `images`, `labels` and `classes`. dataset_tool.py reads both. The last
line is the share of the known labels that the pseudo-labels agree with.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.cli import Parser, UserError, run_main

if TYPE_CHECKING:
    import numpy as np

    from shared.data.images import ImageSet

LABEL_FILE = "pseudo_label.npy"
# What the pseudo-labels of a data set may count, in file order; its size tells which.
POOLS = {"svhn": (("train",), ("train", "extra"))}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--data_path", help="the images: a folder of CIFAR-10 batches, or whatever else names a "
                        "data set [./data/cifar-10-batches-py]")
    parser.add_argument("--save_path", required=True, help=f"folder with {LABEL_FILE}, which gets the new data set")
    parser.add_argument("--dataset", "-ds", default="cifar10", help="name of a data set in --data_dir, or a path "
                        "[%(default)s]")
    parser.add_argument("--data_dir", default="./data", help="folder of the data sets [%(default)s]")
    options = parser.parse_args(argv)
    if options.data_path is not None and options.dataset != "cifar10":
        raise UserError("--data_path and --dataset both name the images: give one of them")
    return options


def main() -> None:
    options = parse()
    import numpy as np

    from shared.data.cifar import CIFAR10, layout_of
    from shared.data.images import ImageSet, with_classes
    from shared.data.writers import write_npz
    from shared.training.files import make_dir

    folder = Path(options.save_path)
    pseudo = read_labels(folder / LABEL_FILE)
    images = matching_images(options, len(pseudo))
    known = images.labels >= 0
    num_classes = images.num_classes or int(pseudo.max()) + 1
    if pseudo.max() >= num_classes:
        raise UserError(f"{folder / LABEL_FILE}: class {pseudo.max()} is none of the {num_classes} of {images.name}; "
                        "it belongs to another data set")
    images = with_classes(images, num_classes, images.name)

    make_dir(folder)
    source = options.data_path or options.dataset
    if source == "cifar10" or layout_of(Path(source)) is CIFAR10:
        written = write_batches(images.images, pseudo, folder)
    else:
        written = folder / f"{folder.resolve().name}-pseudo.npz"
        write_npz(ImageSet(images.images, pseudo, images.classes, images.name), written)

    print(f"true labels   {np.bincount(images.labels[known], minlength=num_classes).tolist()}")
    counts = np.bincount(pseudo, minlength=num_classes)
    print(f"pseudo-labels {counts.tolist()}")
    if not counts.all():
        print(f"no image of class {', '.join(images.classes[c] for c in np.flatnonzero(counts == 0))}: the diffusion "
              "model cannot learn it")
    print(f"wrote {written}")
    print(float(np.mean(pseudo[known] == images.labels[known])) if known.any() else "no true label is known")


def read_labels(file: Path) -> np.ndarray:
    """Return the int64 pseudo-labels; raise UserError for a missing file or anything but class numbers."""
    import numpy as np

    from shared.data.pickles import load_array

    if not file.exists():
        raise UserError(f"{file} is missing; get_labels.py --save_path {file.parent} writes it")
    labels = load_array(file)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise UserError(f"{file}: expected one class number per training image")
    return labels.astype(np.int64)


def matching_images(options: argparse.Namespace, count: int) -> ImageSet:
    """Return the training images, which must be as many as the pseudo-labels."""
    from shared.data.datasets import has_split, load_dataset

    source = options.data_path or options.dataset
    found = []
    own = (("train",), ("unlabeled", "train")) if has_split(source, "unlabeled") else (("train",),)
    for splits in POOLS.get(source, own):
        first, *others = (load_dataset(source, split, options.data_dir) for split in splits)
        if len(first) + sum(map(len, others)) == count:
            for other in others:
                first = first.concatenate(other)
            return first
        found.append(len(first) + sum(map(len, others)))
    raise UserError(f"{options.save_path}/{LABEL_FILE} has {count} labels, {source} has "
                    f"{' or '.join(map(str, found))} training images; it belongs to another data set")


def write_batches(images: np.ndarray, labels: np.ndarray, folder: Path) -> Path:
    """Write CIFAR-10's five training batches with these labels, and the archive of them; return the archive."""
    import tarfile

    from shared.data.cifar import CIFAR10
    from shared.data.writers import cifar_batches
    from shared.training.files import atomic, make_dir

    batches = make_dir(folder / CIFAR10.folder)
    for name, content in cifar_batches(images, labels, CIFAR10.train, CIFAR10):
        with atomic(batches / name) as file:
            file.write(content)
    with atomic(folder / CIFAR10.archive) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        archive.add(batches, CIFAR10.folder, recursive=False)
        for name in CIFAR10.train:
            archive.add(batches / name, f"{CIFAR10.folder}/{name}")
    return folder / CIFAR10.archive


if __name__ == "__main__":
    run_main(main)
