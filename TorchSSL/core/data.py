"""What a trainer learns from: labelled pool, unlabelled pool, test set, and the numbers that normalise them."""
from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.cli import UserError
from shared.data.datasets import NAMES, has_split, load_dataset
from shared.data.images import ImageSet, read_images, shape_text
from shared.data.pickles import load_array
from shared.data.splits import cifar10_one_label_split, class_balanced_split
from shared.training.files import atomic
from shared.training.randomness import numpy_rng
from TorchSSL.core.photographs import PhotographSet, extra_photographs, imagenet

# Channel means and standard deviations on the unit scale, as published with the benchmarks.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "svhn": ((0.4380, 0.4440, 0.4730), (0.1751, 0.1771, 0.1744)),
    "stl10": ((112.4 / 255, 109.1 / 255, 98.6 / 255), (68.4 / 255, 66.6 / 255, 68.5 / 255)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.305,), (0.376,)),
}
INDEX_FILE, FILES_FILE = "sampled_label_idx.npy", "labeled_files.json"


@dataclass(frozen=True)
class TrainingData:
    """Everything read before training.

    labeled: the labelled images (first `num_real` of them) followed by those of --aug_path. unlabeled: the whole
    training set; its labels are known to the metrics alone. test: images with labels. labeled_index: int64 positions of
    the labelled images in their pool. mean, std: per channel, unit scale. validation: training images with labels that
    are in no other set (None without --val_fraction).
    """

    labeled: ImageSet | PhotographSet
    unlabeled: ImageSet | PhotographSet
    test: ImageSet | PhotographSet
    labeled_index: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = field(default=())
    validation: ImageSet | PhotographSet | None = None

    @property
    def num_real(self) -> int:
        return len(self.labeled_index)

    @property
    def class_shares(self) -> list[float]:
        """The share of every class among the real labelled images."""
        counts = np.bincount(self.labeled.labels[:self.num_real], minlength=self.num_classes)
        return (counts / counts.sum()).tolist()


def load_training_data(options: argparse.Namespace, folder: Path) -> TrainingData:
    """Read and check all that `options` ask for; nothing is written. folder: where an earlier split may lie."""
    pool, unlabeled = load_pools(options.dataset, options.data_dir, options.download)
    test = load_split(options.dataset, "test", options.data_dir, options.download)
    num_classes = count_classes(options, pool)
    if (test.channels, test.size) != (pool.channels, pool.size):
        raise UserError(f"{options.dataset}: test images are {shape_text(test)}, training images {shape_text(pool)}")
    if not len(test) or test.labels.min() < 0 or test.labels.max() >= num_classes:
        raise UserError(f"{options.dataset}: every test image needs a label in 0..{num_classes - 1}")
    index, held_out = labeled_and_held_out(options, pool.labels, num_classes, folder)
    labeled = pool.subset(index)
    notes: tuple[str, ...] = ()
    if options.aug_path is not None:
        extra = read_extra_images(options.aug_path, pool, num_classes)
        labeled = labeled.concatenate(dataclasses.replace(extra, classes=pool.classes))
        notes = ("augmentation dataset is added",)
    mean, std = channel_statistics(options.dataset, unlabeled)
    validation = None
    if len(held_out):
        validation = pool.subset(held_out)
        # The pool is the last part of the unlabelled images.
        unlabeled = unlabeled.subset(np.delete(np.arange(len(unlabeled)), len(unlabeled) - len(pool) + held_out))
    return TrainingData(labeled, unlabeled, test, index, num_classes, mean, std, notes, validation)


def load_split(dataset: str, split: str, data_dir: str, download: bool) -> ImageSet | PhotographSet:
    """Return one split of a data set; that of ImageNet stays on the disk."""
    return imagenet(data_dir, split) if dataset == "imagenet" else load_dataset(dataset, split, data_dir, download)


def load_pools(dataset: str, data_dir: str, download: bool) -> tuple[ImageSet | PhotographSet, ...]:
    """Return (images that labels are drawn from, unlabelled images) of a data set; the second contains the first.

    SVHN: both are the training set followed by the extra one. STL-10, and own images with an `unlabeled` part: labels
    come from the training images; unlabelled are the unlabelled images followed by those.
    """
    train = load_split(dataset, "train", data_dir, download)
    if dataset == "svhn":
        train = train.concatenate(load_dataset(dataset, "extra", data_dir, download))
    if has_split(dataset, "unlabeled"):
        unlabeled = load_dataset(dataset, "unlabeled", data_dir, download)
        unlabeled = ImageSet(unlabeled.images, np.full(len(unlabeled), -1), train.classes, unlabeled.name)
        return train, unlabeled.concatenate(train)
    return train, train


def count_classes(options: argparse.Namespace, train: ImageSet | PhotographSet) -> int:
    """Return the number of classes: the data set's own, which --num_classes must equal where it is given."""
    if not train.has_labels:
        raise UserError(f"{options.dataset}: no training image has a label; put images into train/<class>/ folders or "
                        "list labels in dataset.json")
    if options.num_classes != train.num_classes and "num_classes" in options.given:
        raise UserError(f"--num_classes {options.num_classes}: {options.dataset} has {train.num_classes} classes")
    return train.num_classes


def channel_statistics(dataset: str, images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) per channel on the unit scale: published where there are any, else measured on `images`."""
    if dataset in NORMALISATION:
        return NORMALISATION[dataset]
    counts = np.zeros((images.channels, 256))
    for start in range(0, len(images), 4096):
        chunk = images.images[start:start + 4096]
        counts += [np.bincount(chunk[:, channel].ravel(), minlength=256) for channel in range(images.channels)]
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(np.maximum(counts @ levels ** 2 / counts.sum(1) - mean ** 2, 0))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


# ------------------------------------------------------------------------------------------------ the labelled split

def split_facts(options: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """Return what decides a drawn split, as kept beside it."""
    dataset = options.dataset if options.dataset in NAMES else str(Path(options.dataset).absolute())
    return {"dataset": dataset, "num_labels": options.num_labels, "num_classes": num_classes, "seed": options.seed,
            "label_table": options.label_table, "label_idx": options.label_idx is not None}


def labeled_and_held_out(options: argparse.Namespace, labels: np.ndarray, num_classes: int,
                         folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return positions in the pool, int64: of the labelled images, and of --val_fraction of all, drawn from the rest.

    Where every image is labelled, the held-out ones are taken from these.
    """
    known = np.flatnonzero(labels >= 0)
    count = round(options.val_fraction * len(labels))
    rng = numpy_rng(options.seed, 0, "validation")
    if options.num_labels == 0 and options.label_idx is None:
        if count >= len(known):
            raise UserError(f"--val_fraction {options.val_fraction}: {count} images to hold out of {len(known)} that "
                            "have a label leave none to learn from")
        held_out = np.sort(rng.choice(known, count, replace=False))
        labels = labels.copy()
        labels[held_out] = -1
        return labeled_index(options, labels, num_classes, folder), held_out
    index = labeled_index(options, labels, num_classes, folder)
    rest = np.setdiff1d(known, index)
    if count > len(rest):
        raise UserError(f"--val_fraction {options.val_fraction}: {count} images to hold out, but only {len(rest)} "
                        "have a label and are not among the labelled ones")
    return index, np.sort(rng.choice(rest, count, replace=False)) if count else rest[:0]


def labeled_index(options: argparse.Namespace, labels: np.ndarray, num_classes: int, folder: Path) -> np.ndarray:
    """Return which images of the pool are labelled, int64: those of --label_idx, of an earlier start, or drawn."""
    if options.label_idx is not None:
        index = read_index(options.label_idx, labels, "--label_idx")
    elif options.num_labels == 0:
        index = np.flatnonzero(labels >= 0).astype(np.int64)
    elif options.dataset == "cifar10" and options.num_labels == 10 and options.label_table:
        index = cifar10_one_label_split(options.seed)
    else:
        index = class_balanced_split(labels, options.num_labels, num_classes, options.seed)
    found = folder / INDEX_FILE
    if found.exists():
        index = kept_index(found, index, labels, split_facts(options, num_classes))
    return index


def kept_index(file: Path, drawn: np.ndarray, labels: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
    """Return the indices in `file`, which must be those of this command; UserError where they belong to another."""
    kept = read_index(str(file), labels, "the run folder")
    if np.array_equal(kept, drawn):
        return kept
    source = file.with_suffix(".json")
    was = json.loads(source.read_text(encoding="utf-8")) if source.exists() else {}
    changed = [f"{key} {was[key]} there, {facts[key]} here" for key in facts if key in was and was[key] != facts[key]]
    reason = "; ".join(changed) or f"{len(kept)} other images than the {len(drawn)} of this command"
    raise UserError(f"{file} holds the labelled images of another run ({reason}); choose another --save_name, remove "
                    f"that folder, or keep those images with --label_idx {file}")


def read_index(file: str, labels: np.ndarray, flag: str) -> np.ndarray:
    """Read int64 indices of labelled images; UserError for a file that is none, or that does not fit the data set."""
    index = load_array(file, f"{flag} {file}")
    if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
        raise UserError(f"{flag}: {file} must hold a one-dimensional array of integers")
    if index.min() < 0 or index.max() >= len(labels) or len(np.unique(index)) < len(index):
        raise UserError(f"{flag}: {file} must hold different positions in 0..{len(labels) - 1}, the training images")
    if (labels[index] < 0).any():
        raise UserError(f"{flag}: {file} names {(labels[index] < 0).sum()} images without a known label")
    return index.astype(np.int64)


def write_split(data: TrainingData, options: argparse.Namespace, folder: Path) -> None:
    """Write the labelled indices, what they were drawn from, and the labelled class distribution into `folder`."""
    with atomic(folder / INDEX_FILE) as file:
        np.save(file, data.labeled_index)
    with atomic((folder / INDEX_FILE).with_suffix(".json"), "w") as file:
        json.dump(split_facts(options, data.num_classes), file, indent=1)
    if isinstance(data.labeled, PhotographSet):
        with atomic(folder / FILES_FILE, "w") as file:
            json.dump(data.labeled.subset(slice(data.num_real)).names_by_class(), file, indent=1)
    statistics = folder / "data_statistics"
    statistics.mkdir(exist_ok=True)
    with atomic(statistics / f"{Path(options.dataset).stem}_{data.num_real}.json", "w") as file:
        json.dump({"distribution": data.class_shares}, file)


# ------------------------------------------------------------------------------------------------------ extra images

def read_extra_images(path: str, train: ImageSet | PhotographSet, num_classes: int) -> ImageSet | PhotographSet:
    """Read labelled images of --aug_path: one folder per class, named by its number or by the class's name.

    Raises UserError for another layout, labels beyond the classes and images of another size than `train`'s.
    """
    flag = f"--aug_path {path}"
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{flag}: no such folder; stage 2 writes it, as <class>/<image>.png")
    classes = None
    if folder.is_dir() and not (folder / "dataset.json").exists():
        names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        numbered = all(name.isascii() and name.isdigit() for name in names)
        classes = None if numbered else train.classes
        unknown = sorted(set(names) - set(train.classes))
        if not names:
            raise UserError(f"{flag}: expected one folder per class (0, 1, ... or the names of the classes) with "
                            "images inside; it has no sub-folder")
        if not numbered and unknown:
            raise UserError(f"{flag}: the folder {unknown[0]!r} is neither a class number nor one of the classes "
                            f"{', '.join(train.classes[:10])}")
    if isinstance(train, PhotographSet):
        return extra_photographs(folder, num_classes, classes)
    extra = read_images(folder, channels=train.channels, num_classes=num_classes, classes=classes)
    if (extra.labels < 0).any():
        raise UserError(f"{flag}: {(extra.labels < 0).sum()} images have no class; expected <class>/<image>.png")
    if extra.size != train.size:
        raise UserError(f"{flag}: its images are {shape_text(extra)}, those of {train.name} {shape_text(train)} "
                        "(channels x height x width)")
    return extra
