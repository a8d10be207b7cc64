"""Write a data set with pseudo-labels instead of the true ones (stage 1c of DPT).

    python pseudo_dataset.py --data_path ./data/cifar-10-batches-py --save_path ./saved_models/freematch_cifar10_40_1
    python pseudo_dataset.py --dataset=svhn --save_path ./saved_models/freematch_svhn_40_1

Reads <save_path>/pseudo_label.npy by get_labels.py. For CIFAR-10 it writes the published form,
<save_path>/cifar-10-batches-py/data_batch_1 to 5 and <save_path>/cifar-10-python.tar.gz; for any other data set
<save_path>/<name of that folder>-pseudo.npz with `images`, `labels` and `classes`. dataset_tool.py reads both. The last
line is the fraction of known labels that equal their pseudo-labels.
"""
from __future__ import annotations

import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from shared.cli import Flag, Option, Text, UserError, parse, run_main
from shared.data.datasets import has_split, load_dataset
from shared.data.formats import CIFAR10, cifar_batches, layout_of
from shared.data.images import ImageSet, with_classes
from shared.data.writers import write_npz
from shared.training.files import atomic, make_dir
from shared.training.record import Record
from TorchSSL.core.labels import PSEUDO_LABEL_FILE, read_pseudo_labels

FLAGS = (
    Option("--data_path", Text, None, "the images: a folder of CIFAR-10 batches, or any other data set (default: "
           "./data/cifar-10-batches-py)"),
    Option("--save_path", Text, required=True, help="folder with pseudo_label.npy, which gets the new data set"),
    Option("--dataset -ds", Text, "cifar10", "name of a data set in --data_dir, or a path"),
    Option("--data_dir", Text, "./data", "folder of the data sets"),
    Option("--overwrite", Flag, False, "replace a data set of other images or pseudo-labels"),
)


def main() -> None:
    options = parse(__doc__, FLAGS)
    if options.data_path is not None and options.dataset != "cifar10":
        raise UserError("--data_path and --dataset both name the images: give one of them")
    folder, source = Path(options.save_path), options.data_path or options.dataset
    file = folder / PSEUDO_LABEL_FILE
    pseudo = read_pseudo_labels(file, "--save_path")
    images = matching_images(source, options, len(pseudo))
    known = images.labels >= 0
    num_classes = images.num_classes or int(pseudo.max()) + 1
    if pseudo.max() >= num_classes:
        raise UserError(f"{file}: class {pseudo.max()} is none of the {num_classes} of {images.name}; it belongs to "
                        "another data set")
    images = with_classes(images, num_classes, images.name)

    make_dir(folder)
    is_cifar = source == "cifar10" or layout_of(Path(source)) is CIFAR10
    written = folder / (CIFAR10.archive if is_cifar else f"{folder.resolve().name}-pseudo.npz")
    record = Record(written, {}, {"--data_path" if options.data_path else "--dataset": images, PSEUDO_LABEL_FILE: file})
    if record.is_complete(options.overwrite):
        return
    if is_cifar:
        write_batches(images.images, pseudo, folder)
    else:
        write_npz(ImageSet(images.images, pseudo, images.classes, images.name), written)
    record.write()

    print(f"true labels   {np.bincount(images.labels[known], minlength=num_classes).tolist()}")
    counts = np.bincount(pseudo, minlength=num_classes)
    print(f"pseudo-labels {counts.tolist()}")
    if not counts.all():
        print(f"no image of class {', '.join(images.classes[c] for c in np.flatnonzero(counts == 0))}: the diffusion "
              "model cannot learn it")
    print(f"wrote {written}")
    print(float(np.mean(pseudo[known] == images.labels[known])) if known.any() else "no true label is known")


def matching_images(source: str, options: SimpleNamespace, count: int) -> ImageSet:
    """Return the `count` training images of `source`, one per pseudo-label, in file order; UserError."""
    candidates = [("train",)]
    if source == "svhn":
        candidates = [("train",), ("train", "extra")]
    elif has_split(source, "unlabeled"):
        candidates = [("train",), ("unlabeled", "train")]
    counts = []
    for splits in candidates:
        parts = [load_dataset(source, split, options.data_dir) for split in splits]
        counts.append(sum(map(len, parts)))
        if counts[-1] == count:
            return parts[0] if len(parts) == 1 else parts[0].concatenate(parts[1])
    raise UserError(f"{options.save_path}/{PSEUDO_LABEL_FILE} has {count} labels, {source} has "
                    f"{' or '.join(map(str, counts))} training images; it belongs to another data set")


def write_batches(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write CIFAR-10's five training batches with these labels, and the archive of them."""
    batches = make_dir(folder / CIFAR10.folder)
    for name, content in cifar_batches(images, labels, CIFAR10.train, CIFAR10):
        with atomic(batches / name) as file:
            file.write(content)
    with atomic(folder / CIFAR10.archive) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        archive.add(batches, CIFAR10.folder, recursive=False)
        for name in CIFAR10.train:
            archive.add(batches / name, f"{CIFAR10.folder}/{name}")


if __name__ == "__main__":
    run_main(main)
