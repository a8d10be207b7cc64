"""The data sets of the experiments, split as published: labelled, unlabelled, validation and test images."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from DASO.lib.config.config import Config
from DASO.lib.data.augment import Look
from DASO.lib.data.semi_aves import load_semi_aves
from shared.augment.views import WeakPolicy
from shared.cli import UserError
from shared.data.datasets import has_split, load_dataset
from shared.data.images import ImageSet, channel_statistics, read_images, shape_text
from shared.training.files import make_dir

CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100_STATISTICS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_STATISTICS = (0.305,), (0.376,)
WITHOUT_UNLABELLED = ("Supervised", "cRT")  # learners that use no unlabelled images


@dataclass(frozen=True)
class TrainingData:
    """Everything read before training.

    unlabelled: None for learners without; its labels, where known, serve statistics only. generated: how many of the
    labelled images, the last ones, are those of DATASET.AUG_PATH.
    """

    labelled: ImageSet
    unlabelled: ImageSet | None
    valid: ImageSet | None
    test: ImageSet | None
    look: Look
    num_classes: int
    generated: int = 0

    @property
    def counts(self) -> np.ndarray:
        """Labelled images of every class, int64 [K]."""
        return np.bincount(self.labelled.labels, minlength=self.num_classes)

    @property
    def real_labelled(self) -> ImageSet:
        """The labelled images without generated ones."""
        return self.labelled.subset(slice(len(self.labelled) - self.generated))

    @property
    def real_counts(self) -> np.ndarray:
        """Labelled images of every class, without generated ones, int64 [K]."""
        return np.bincount(self.real_labelled.labels, minlength=self.num_classes)


# ---------------------------------------------------------------------------------------------------------- data sets

def load_data(cfg: Config) -> TrainingData:
    """Read and split the data set of the configuration; nothing is written. Raises UserError."""
    name = cfg.DATASET.NAME
    data = _read_semi_aves(cfg) if name == "semi_aves" else _split_pool(cfg)
    if data.num_classes != cfg.MODEL.NUM_CLASSES:
        raise UserError(f"MODEL.NUM_CLASSES {cfg.MODEL.NUM_CLASSES}: {name} has {data.num_classes} classes; set "
                        f"MODEL.NUM_CLASSES {data.num_classes}")
    if data.unlabelled is not None and len(data.unlabelled) == 0:
        raise UserError(f"{name}: no unlabelled images; check NUM_UNLABELED_HEAD")
    return with_generated(data, cfg.DATASET.AUG_PATH) if cfg.DATASET.AUG_PATH else data


def with_generated(data: TrainingData, path: str) -> TrainingData:
    """Return the data with the images of a folder, zip or npz among the labelled ones; UserError."""
    labelled = data.labelled
    generated = read_images(path, resolution=labelled.size[0], channels=labelled.channels, num_classes=data.num_classes,
                            classes=labelled.classes)
    if (generated.labels < 0).any():
        raise UserError(f"DATASET.AUG_PATH {path}: {int((generated.labels < 0).sum())} images have no class; expected "
                        "one sub-folder a class, named by its number")
    generated = ImageSet(generated.images, generated.labels, labelled.classes, generated.name)
    return replace(data, labelled=labelled.concatenate(generated), generated=len(generated))


def _read(name: str, split: str, cfg: Config) -> ImageSet:
    """Read a split below DATASET.ROOT, downloading what is missing if DATASET.DOWNLOAD."""
    root = Path(cfg.DATASET.ROOT)
    try:
        return load_dataset(name, split, root)
    except UserError as missing:
        if not cfg.DATASET.DOWNLOAD or "not found" not in str(missing):
            raise
        return load_dataset(name, split, make_dir(root), download=True)


def look_of(cfg: Config, images: ImageSet) -> Look:
    """Return how the images of the data set are seen. Digits are for trying out: shifts of a pixel, no mirror images.

    Own images are normalised by their own statistics and shifted by up to an eighth of their side.
    """
    side = cfg.DATASET.RESOLUTION
    if cfg.is_own:
        policy = WeakPolicy(pad=max(1, min(images.size) // 8))
        return Look(*channel_statistics(images), side, policy, cutout_side=max(1, min(images.size) // 2))
    if cfg.DATASET.NAME == "digits":
        return Look(*DIGITS_STATISTICS, side, WeakPolicy(flip=False, pad=1, pad_mode="zero"), cutout_side=3)
    if cfg.DATASET.NAME == "semi_aves":
        return Look(*IMAGENET_STATISTICS, side, WeakPolicy(pad=0, crop=side), cutout_side=side // 2)
    # STL-10 is normalised by the numbers of CIFAR-10, as published.
    return Look(*(CIFAR100_STATISTICS if cfg.DATASET.NAME == "cifar100" else CIFAR10_STATISTICS), side)


def _split_pool(cfg: Config) -> TrainingData:
    """Split the training images of a data set into labelled, validation and unlabelled ones.

    The unlabelled images of STL-10, whose classes are not known, are a set of their own.
    """
    name, tail, learner = cfg.DATASET.NAME, cfg.long_tail, cfg.ALGORITHM.NAME
    pool = _read(name, "train", cfg)
    counts = {"head": tail.NUM_LABELED_HEAD, "factor": tail.IMB_FACTOR_L, "num_valid": cfg.DATASET.NUM_VALID,
              "labelled_counts": own_counts(cfg, "LABELED_COUNTS", pool),
              "unlabelled_counts": own_counts(cfg, "UNLABELED_COUNTS", pool)}
    further = name == "stl10" or cfg.is_own and has_split(name, "unlabeled")  # unlabelled images of their own
    if learner == "DARP_ESTIM" and name != "cifar100":
        counts |= {"holdout": cfg.ALGORITHM.DARP_ESTIM.PER_CLASS_VALID_SAMPLES}
    if not further:
        counts |= {"unlabelled_head": max(0, tail.NUM_UNLABELED_HEAD), "reverse": cfg.DATASET.REVERSE_UL_DISTRIBUTION,
                   "unlabelled_factor": tail.IMB_FACTOR_UL if learner != "Supervised" else 1}
    labelled, valid, unlabelled = select(pool.labels, pool.num_classes, cfg.SEED, **counts)
    others = None
    if learner not in WITHOUT_UNLABELLED:
        others = without_labels(_read(name, "unlabeled", cfg), pool) if further else pool.subset(unlabelled)
    test = _read(name, "test", cfg) if cfg.EVAL_ON_TEST_SET else None
    if test is not None and (test.images.shape[1:] != pool.images.shape[1:] or test.labels.min() < 0
                             or test.labels.max() >= pool.num_classes):
        raise UserError(f"DATASET.NAME {name}: the test images need the size of the training images, "
                        f"{shape_text(pool)}, and one of their {pool.num_classes} classes each")
    return TrainingData(pool.subset(labelled), others, pool.subset(valid) if len(valid) else None, test,
                        look_of(cfg, pool), pool.num_classes)


def own_counts(cfg: Config, key: str, pool: ImageSet) -> np.ndarray | None:
    """Return the images of each class that DATASET.LABELED_COUNTS or UNLABELED_COUNTS lists, None without; UserError
    unless there is one for each class."""
    counts = np.array(getattr(cfg.DATASET, key), np.int64)
    if len(counts) not in (0, pool.num_classes):
        raise UserError(f"DATASET.{key}: {len(counts)} numbers, but {cfg.DATASET.NAME} has {pool.num_classes} classes"
                        + (f" ({', '.join(pool.classes[:10])})" if cfg.is_own else ""))
    return counts if len(counts) else None


def without_labels(images: ImageSet, pool: ImageSet) -> ImageSet:
    """Return the separate unlabelled images, whose folders are not classes of `pool`."""
    return ImageSet(images.images, np.full(len(images), -1, np.int64), pool.classes, images.name)


def _read_semi_aves(cfg: Config) -> TrainingData:
    unlabelled = "" if cfg.ALGORITHM.NAME in WITHOUT_UNLABELLED else cfg.DATASET.SEMIAVES.UNLABELED
    sets = load_semi_aves(Path(cfg.DATASET.ROOT), cfg.DATASET.RESOLUTION * 8 // 7, unlabelled)
    if not cfg.EVAL_ON_TEST_SET:
        sets["test"] = None
    return TrainingData(**sets, look=look_of(cfg, sets["labelled"]), num_classes=sets["labelled"].num_classes)


# -------------------------------------------------------------------------------------------- long-tailed selection

def long_tail_counts(head: int, factor: float, num_classes: int, reverse: bool = False) -> np.ndarray:
    """Return the images of each class, int64 [K]: from `head` falling geometrically to head / factor, truncated.

    reverse: the last class is the most frequent one.
    """
    ranks = np.arange(num_classes)
    counts = np.array([int(head * (1.0 / factor) ** (rank / max(1, num_classes - 1))) for rank in ranks.tolist()])
    return counts[::-1].copy() if reverse else counts


def select(labels: np.ndarray, num_classes: int, seed: int, *, head: int, factor: float, num_valid: int,
           unlabelled_head: int | None = None, unlabelled_factor: float = 1, reverse: bool = False,
           holdout: int | None = None, labelled_counts: np.ndarray | None = None,
           unlabelled_counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the labelled, validation and unlabelled images of an experiment in the published order.

    They are int64 positions in a pool of training images with `labels` int64 [N].
    head, factor: of the labelled images; unlabelled_head, unlabelled_factor: of the unlabelled ones, None for no such
    set. reverse: the unlabelled ones are most frequent where the labelled ones are rarest. holdout: as many labelled
    images of every class become the validation set (of the initial validation images where the rarest class has not
    more than ten). labelled_counts, unlabelled_counts: images of every class, int64 [K], in place of head and factor.

    Every stage draws from a fresh RandomState(seed), class after class. Raises UserError where a class has too few.
    """
    kept = np.arange(len(labels))
    valid = np.array([], np.int64)
    if num_valid > 0:
        valid, kept = _split(labels, kept, num_classes, seed, num_valid // num_classes)
        if not len(valid) or not len(kept):
            raise UserError(f"DATASET.NUM_VALID {num_valid} leaves {len(kept)} training and {len(valid)} validation "
                            "images; choose a positive multiple of the number of classes, or 0 for none")
    labelled, unlabelled = kept, None
    heads = np.full(num_classes, head) if labelled_counts is None else labelled_counts
    if unlabelled_head is not None or labelled_counts is not None:
        labelled, rest = _split(labels, kept, num_classes, seed, heads)
        _check_enough(labels, labelled, heads, "labelled")
    if unlabelled_head is not None:
        wanted = np.full(num_classes, unlabelled_head) if unlabelled_counts is None else unlabelled_counts
        unlabelled = _first(labels, rest, num_classes, wanted)
        _check_enough(labels, unlabelled, wanted, "unlabelled")
    if factor > 1 and labelled_counts is None:
        labelled = _thin(labels, labelled, seed, long_tail_counts(head, factor, num_classes), "labelled")
    if holdout is not None:
        if int(head / factor) > 10:
            valid = _first(labels, labelled, num_classes, holdout)
            labelled = _first(labels, labelled[~np.isin(labelled, valid)], num_classes, len(labels))
        else:
            valid = _first(labels, valid, num_classes, holdout)
    if unlabelled is not None and unlabelled_factor > 1 and unlabelled_counts is None:
        counts = long_tail_counts(unlabelled_head, unlabelled_factor, num_classes, reverse)
        unlabelled = _thin(labels, unlabelled, seed, counts, "unlabelled", reverse)
    return labelled, valid, unlabelled


def _split(labels: np.ndarray, pool: np.ndarray, num_classes: int, seed: int,
           first: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle every class; return the `first` of each (one number, or one a class), and the others, class by class."""
    first = np.broadcast_to(first, num_classes)
    draw, taken, rest = np.random.RandomState(seed), [], []
    for label in range(num_classes):
        members = pool[labels[pool] == label]
        draw.shuffle(members)
        taken.append(members[:first[label]])
        rest.append(members[first[label]:])
    return np.concatenate(taken), np.concatenate(rest)


def _first(labels: np.ndarray, pool: np.ndarray, num_classes: int, count: int | np.ndarray) -> np.ndarray:
    """Return the first `count` images of every class (one number, or one a class) in the pool's order, by class."""
    counts = np.broadcast_to(count, num_classes)
    return np.concatenate([pool[labels[pool] == label][:counts[label]] for label in range(num_classes)])


def _thin(labels: np.ndarray, pool: np.ndarray, seed: int, counts: np.ndarray, name: str,
          reverse: bool = False) -> np.ndarray:
    """Shuffle every class and keep counts[c] images of it; `reverse` begins with the last class."""
    _check_enough(labels, pool, counts, name)
    draw, kept = np.random.RandomState(seed), []
    for label in range(len(counts))[::-1] if reverse else range(len(counts)):
        members = pool[labels[pool] == label]
        draw.shuffle(members)
        kept.append(members[:counts[label]])
    return np.concatenate(kept)


def _check_enough(labels: np.ndarray, pool: np.ndarray, counts: np.ndarray, name: str) -> None:
    found = np.bincount(labels[pool], minlength=len(counts))
    short = np.flatnonzero(found < counts)
    if len(short):
        label = short[0]
        raise UserError(f"class {label} has {found[label]} images left for the {name} set, but {counts[label]} are "
                        "asked for; lower DATASET.*.NUM_LABELED_HEAD, NUM_UNLABELED_HEAD or DATASET.NUM_VALID")
