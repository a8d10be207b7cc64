"""The data of a training: labelled and unlabelled pool, test set, normalisation, and the batch of a step.

A batch is a function of (seed, step) alone, on any number of ranks.
"""
from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from shared.augment.views import (
    StrongDraws,
    WeakPolicy,
    draw_strong,
    draw_weak,
    randaugment,
    rotate_quarter_turns,
    strong,
    weak,
)
from shared.cli import UserError
from shared.data.classes import LABEL_FILE, are_numbers, class_folders
from shared.data.datasets import NAMES, has_split, load_dataset, own_resize
from shared.data.images import ImageSet, UnequalSizes, iterate, read_images, shape_text, with_names
from shared.data.images import channel_statistics as measured_statistics
from shared.data.photographs import EVAL_SIDE, PhotographSet, list_imagenet, list_photographs
from shared.data.pool import PhotographPool, Pool, make_pool
from shared.distributed import World
from shared.networks import source_of
from shared.training.files import write_array, write_json
from shared.training.fingerprint import fingerprint_arrays, fingerprints
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng
from TorchSSL.core.algorithm import Batch
from TorchSSL.core.labels import INDEX_FILE, labeled_and_held_out, split_facts

# Channel means and standard deviations on the unit scale, as published with the benchmarks.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "svhn": ((0.4380, 0.4440, 0.4730), (0.1751, 0.1771, 0.1744)),
    "stl10": ((112.4 / 255, 109.1 / 255, 98.6 / 255), (68.4 / 255, 66.6 / 255, 68.5 / 255)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.305,), (0.376,)),
}
FILES_FILE = "labeled_files.json"
CONVERTED = "converted "  # of images that dataset_tool.py resized; the way follows
LISTED_CLASSES = 20  # more are summed up in a report


@dataclass(frozen=True)
class TrainingData:
    """The images of a training.

    labeled: the labelled images (first `num_real` of them) followed by those of --aug_path. unlabeled: the whole
    training set; only metrics read its labels. test: images with labels. labeled_index: int64 positions of the labelled
    images in their pool. mean, std: per channel, unit scale. notes: lines for the log. validation: training images with
    labels that are in no other set (None without --val_fraction).
    """

    labeled: ImageSet | PhotographSet
    unlabeled: ImageSet | PhotographSet
    test: ImageSet | PhotographSet
    labeled_index: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    validation: ImageSet | PhotographSet | None = None

    @property
    def num_real(self) -> int:
        return len(self.labeled_index)

    @property
    def class_fractions(self) -> list[float]:
        """The fraction of every class among the real labelled images."""
        counts = np.bincount(self.labeled.labels[:self.num_real], minlength=self.num_classes)
        return (counts / counts.sum()).tolist()


def load_training_data(options: SimpleNamespace, folder: Path) -> TrainingData:
    """Read and check the data sets of `options`; nothing is written. folder: of the run, with an earlier split."""
    pool, unlabeled = load_pools(options.dataset, options.data_dir, options.download, options.labels)
    test = load_split(options.dataset, "test", options.data_dir, options.download)
    if options.labels is not None and pool.classes:
        test = with_names(test, pool.classes, options.dataset)
    num_classes = count_classes(options, pool)
    if (test.channels, test.size) != (pool.channels, pool.size):
        raise UnequalSizes(f"{options.dataset}: test images are {shape_text(test)}, training images {shape_text(pool)}")
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


def load_split(dataset: str, split: str, data_dir: str, download: bool,
               table: str | None = None) -> ImageSet | PhotographSet:
    """Return one split of a data set; the photographs of ImageNet stay on the disk. table: a CSV of its labels."""
    if dataset == "imagenet" and table is None:
        return list_imagenet(data_dir, split)
    return load_dataset(dataset, split, data_dir, download, table)


def load_pools(dataset: str, data_dir: str, download: bool,
               table: str | None = None) -> tuple[ImageSet | PhotographSet, ...]:
    """Return (images that labels are drawn from, unlabelled images) of a data set; the second contains the first.

    SVHN: both are the training set followed by the extra one. STL-10, and own images with an `unlabeled` part: labels
    come from the training images; the unlabelled pool is the unlabelled images followed by those.
    """
    train = load_split(dataset, "train", data_dir, download, table)
    if dataset == "svhn":
        train = train.concatenate(load_dataset(dataset, "extra", data_dir, download))
    if has_split(dataset, "unlabeled"):
        unlabeled = load_dataset(dataset, "unlabeled", data_dir, download)
        unlabeled = ImageSet(unlabeled.images, np.full(len(unlabeled), -1), train.classes, unlabeled.name)
        return train, unlabeled.concatenate(train)
    return train, train


def count_classes(options: SimpleNamespace, train: ImageSet | PhotographSet) -> int:
    """Return the number of classes of the data set; UserError if a given --num_classes differs."""
    if not train.has_labels:
        raise UserError(f"{options.dataset}: no training image has a label; put images into train/<class>/ folders or "
                        "list labels in dataset.json")
    if options.num_classes != train.num_classes and "num_classes" in options.given:
        raise UserError(f"--num_classes {options.num_classes}: {options.dataset} has {train.num_classes} classes")
    return train.num_classes


def channel_statistics(dataset: str, images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) per channel on the unit scale: published for the benchmarks, else measured on `images`."""
    if dataset in NORMALISATION:
        return NORMALISATION[dataset]
    return measured_statistics(images)


def read_extra_images(path: str, train: ImageSet | PhotographSet, num_classes: int) -> ImageSet | PhotographSet:
    """Read the labelled images of --aug_path: one folder per class, named by its number or by the class's name.

    Raises UserError for another layout, labels beyond the classes and images of another size than `train`'s.
    """
    flag, folder = f"--aug_path {path}", Path(path)
    if not folder.exists():
        raise UserError(f"{flag}: no such folder; stage 2 writes it, as <class>/<image>.png")
    classes = train.classes
    if folder.is_dir() and not (folder / LABEL_FILE).exists():
        names = class_folders(folder)
        if not names:
            raise UserError(f"{flag}: expected one folder per class (0, 1, ... or the names of the classes) with "
                            "images inside; it has no sub-folder with images")
        if not are_numbers(names) and (unknown := sorted(set(names) - set(classes))):
            raise UserError(f"{flag}: the folder {unknown[0]!r} is neither a class number nor one of the classes "
                            f"{', '.join(classes[:10])}")
    if isinstance(train, PhotographSet):
        extra = list_photographs(folder, classes)
        if extra.labels.max() >= num_classes:
            raise UserError(f"{flag}: has class {extra.labels.max()}, there are only {num_classes} classes")
        return extra
    extra = read_images(folder, channels=train.channels, num_classes=num_classes, classes=classes)
    if (extra.labels < 0).any():
        raise UserError(f"{flag}: {(extra.labels < 0).sum()} images have no class; expected <class>/<image>.png")
    if extra.size != train.size:
        raise UserError(f"{flag}: its images are {shape_text(extra)}, those of {train.name} {shape_text(train)} "
                        "(channels x height x width)")
    return extra


def input_fingerprints(data: TrainingData, options: SimpleNamespace) -> dict[str, str]:
    """Return the fingerprint of the images and labels of each flag that was given."""
    sets = (data.unlabeled, data.test) if data.validation is None else (data.unlabeled, data.test, data.validation)
    extra = data.labeled.subset(slice(data.num_real, None))
    return fingerprints({
        "--dataset": fingerprint_arrays(*[part for images in sets for part in content(images)], data.unlabeled.classes),
        "--aug_path": fingerprint_arrays(*content(extra)) if options.aug_path else None,
        "--aug_filter": options.aug_filter,
        "--pretrained": source_of(options.pretrained)})


def resize_of(dataset: str) -> str | None:
    """Return how images of another size become like those of a set, as a checkpoint records it; None: not known."""
    how = None if dataset in NAMES else own_resize(Path(dataset))
    return how and CONVERTED + how


def content(images: ImageSet | PhotographSet) -> tuple[np.ndarray | list[str], np.ndarray]:
    """Return the parts of the fingerprint of a set, beside its class names; photographs count by their names."""
    if isinstance(images, PhotographSet):
        return ["/".join(file.split("/")[-2:]) for file in images.files.tolist()], images.labels
    return images.images, images.labels


def write_split(data: TrainingData, options: SimpleNamespace, folder: Path) -> None:
    """Write the labelled indices, their seed and settings, and the labelled class distribution into `folder`."""
    write_array(folder / INDEX_FILE, data.labeled_index)
    write_json((folder / INDEX_FILE).with_suffix(".json"), split_facts(options, data.num_classes))
    if isinstance(data.labeled, PhotographSet):
        write_json(folder / FILES_FILE, data.labeled.subset(slice(data.num_real)).names_by_class())
    statistics = folder / "data_statistics"
    statistics.mkdir(exist_ok=True)
    write_json(statistics / f"{Path(options.dataset).stem}_{data.num_real}.json",
               {"distribution": data.class_fractions}, indent=None)


class Batches:
    """Makes the batch of any step.

    views: of an unlabelled image, each "weak" (flip and shift), "medium" (one operation of RandAugment), "strong"
    (RandAugment and cutout; both then have a flip and shift of their own) or "rotated" (the first strong view, turned;
    after all others). labeled_views: weak or strong ones of a labelled image, besides its first weak one. size:
    labelled images in the global batch; every rank has an equal part of it. Raises UserError for images that are too
    small for the weak augmentation or cannot be rotated.
    """

    def __init__(self, data: TrainingData, options: SimpleNamespace, world: World, views: tuple[str, ...],
                 size: int, labeled_views: tuple[str, ...] = ()) -> None:
        self.data, self.options, self.world = data, options, world
        self.rotated = "rotated" in views
        self.views, self.labeled_views = tuple(view for view in views if view != "rotated"), labeled_views
        height, width = data.unlabeled.size
        if self.rotated and height != width:
            raise UserError(f"images of {height}x{width} cannot be rotated by quarter turns; this algorithm needs "
                            "square images")
        self.labeled, self.unlabeled = (
            make_pool(images, data.mean, data.std, world.device, options.num_workers, options.decoder)
            for images in (data.labeled, data.unlabeled))
        self.policy = WeakPolicy(options.weak_flip, options.weak_pad, options.weak_pad_mode, options.weak_subpixel,
                                 EVAL_SIDE if isinstance(data.unlabeled, PhotographSet) else None)
        draw_weak(1, np.random.default_rng(0), data.unlabeled.size, self.policy)  # refuses too small images now
        self.memory_format = torch.contiguous_format if options.strict else torch.channels_last
        # Drawn for the global batch, labelled images first, then view after view; this rank's part of each.
        self.counts = [size] + [size * options.uratio] * len(self.views) + [size] * len(labeled_views)
        self.parts = [world.slice(count) for count in self.counts]
        self.rows = rows_of_rank([part.stop - part.start for part in self.parts], world)

    def __call__(self, step: int) -> Batch:
        """Return the batch of `step`."""
        device = self.world.device
        labeled = self.labeled_positions(step)[self.parts[0]]
        images, index, turns = [self.labeled.take(labeled)], None, None
        if self.views:
            unlabeled = self.rng(step, "unlabeled").integers(len(self.unlabeled), size=self.counts[1])[self.parts[1]]
            plain, index = self.unlabeled.take(unlabeled), to_device(unlabeled, device)
        for number, view in enumerate(self.views):
            draws = self.strong_draws(view, step, f"{view} {number}", 1)
            images.append(augmented(self.unlabeled, unlabeled, plain, view, draws))
        for number, view in enumerate(self.labeled_views):
            draws = self.strong_draws(view, step, f"labeled {view} {number}", 0)
            images.append(augmented(self.labeled, labeled, images[0], view, draws))

        draws = draw_weak(sum(self.counts), self.rng(step, "weak"), self.data.unlabeled.size, self.policy)[self.rows]
        joint = weak(torch.cat(images), draws, self.data.mean, self.data.std)
        joint = joint.contiguous(memory_format=self.memory_format)
        first, *views = joint.split([len(part) for part in images])
        views, labeled_views = views[:len(self.views)], views[len(self.views):]
        if self.rotated:
            turns = self.rng(step, "turns").integers(4, size=self.counts[1])[self.parts[1]]
            views.append(rotate_quarter_turns(views[self.views.index("strong")], turns))
            turns = to_device(turns, device)
        return Batch(first, self.labeled.labels[to_device(labeled, device)], tuple(views), index,
                     None if index is None else self.unlabeled.labels[index], turns, tuple(labeled_views))

    def labeled_positions(self, step: int) -> np.ndarray:
        """Draw the global labelled batch, int64 [size], with replacement: uniformly, or with a fraction of real images.

        A fraction that is no whole number of images is met on average.
        """
        rng, count = self.rng(step, "labeled"), self.counts[0]
        real, fraction = self.data.num_real, self.options.real_fraction
        if fraction is None:
            return rng.integers(len(self.labeled), size=count)
        from_real = int(count * fraction + rng.random())
        return np.concatenate([rng.integers(real, size=from_real),
                               rng.integers(real, len(self.labeled), size=count - from_real)])

    def strong_draws(self, view: str, step: int, purpose: str, part: int) -> StrongDraws | None:
        """Return this rank's draws for a medium or strong view of the labelled (part 0) or unlabelled images (1)."""
        if view == "weak":
            return None
        operations = 1 if view == "medium" else self.options.strong_ops
        rng, size = self.rng(step, purpose), self.data.unlabeled.size
        return draw_strong(self.counts[part], rng, size, operations)[self.parts[part]]

    def rng(self, step: int, purpose: str) -> np.random.Generator:
        return numpy_rng(self.options.seed, step, purpose)


def augmented(pool: Pool | PhotographPool, positions: np.ndarray, images: Tensor, view: str,
              draws: StrongDraws | None) -> Tensor:
    """Return uint8 images [n, C, H, W] as a view begins, before its flip and shift; images: at `positions` of pool."""
    if draws is None:
        return images
    if isinstance(pool, PhotographPool):  # augmented at full size, then resized
        return (pool.medium if view == "medium" else pool.strong)(positions, draws)
    if view == "medium":
        return randaugment.apply(images, draws.operations, draws.magnitudes)
    return strong(images, draws)


def rows_of_rank(sizes: list[int], world: World) -> np.ndarray:
    """Return the places of this rank's rows, int64 [sum(sizes)], in the concatenated parts of the global batch.

    sizes: of this rank's share of each part, equal on all ranks.
    """
    starts = np.cumsum([0, *sizes]) * world.size
    return np.concatenate([start + world.rank * size + np.arange(size)
                           for start, size in zip(starts, sizes, strict=False)])


# ----------------------------------------------------------------------------------------------------------- a summary

def report(train: ImageSet, test: ImageSet | None = None, unlabeled: ImageSet | None = None) -> str:
    """Return lines for the user: size, images per class, unlabelled images, and duplicates within and between the sets.

    Two images are duplicates if every pixel is equal.
    """
    parts = {name: part for name, part in (("train", train), ("test", test), ("unlabeled", unlabeled)) if part}
    lines = [f"data set {train.name}: {train.num_classes} classes, images {shape_text(train)}"]
    counts = {split: np.bincount(part.labels[part.labels >= 0], minlength=train.num_classes)
              for split, part in parts.items()}
    for split, part in parts.items():
        unknown = int((part.labels < 0).sum())
        balance = f", {counts[split].min()} to {counts[split].max()} a class" if part.has_labels else ""
        lines.append(f"  {split:5s} {len(part)} images{balance}" + (f", {unknown} without a label" if unknown else ""))
        if part.images.shape[1:] != train.images.shape[1:]:
            lines.append(f"  warning: the {split} images are {shape_text(part)}")
    labelled = {split: count for split, count in counts.items() if parts[split].has_labels}
    for index, name in enumerate(train.classes if train.num_classes <= LISTED_CLASSES else ()):
        lines.append(f"  class {index:2d} {name:20s} " + "  ".join(f"{s} {c[index]}" for s, c in labelled.items()))
    hashes = {split: pixel_hashes(part) for split, part in parts.items()}
    found = [f"{len(part) - len(np.unique(hashes[split]))} within {split}" for split, part in parts.items()]
    for one, other, adjective in (("test", "train", "test"), ("unlabeled", "test", "unlabelled"),
                                  ("unlabeled", "train", "unlabelled")):
        if one in parts and other in parts:
            found.append(f"{int(np.isin(hashes[one], hashes[other]).sum())} {adjective} images are also in {other}")
    return "\n".join([*lines, f"  duplicates: {', '.join(found)}"])


def pixel_hashes(images: ImageSet) -> np.ndarray:
    """Return one uint64 an image; two different images share one with a chance of 2^-64 or so."""
    return np.array([zlib.crc32(image) << 32 | zlib.adler32(image) for chunk, _ in iterate(images)
                     for image in np.ascontiguousarray(chunk).reshape(len(chunk), -1)], np.uint64)
