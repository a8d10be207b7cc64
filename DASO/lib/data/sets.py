"""The data sets of the experiments, split as published: labelled, unlabelled, validation and test images."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from DASO.lib.config.config import Config
from DASO.lib.data.augment import Look
from DASO.lib.data.long_tail import select
from DASO.lib.data.semi_aves import load_semi_aves
from shared.augment.views import WeakPolicy
from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.images import ImageSet, read_images

CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100_STATISTICS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_STATISTICS = (0.305,), (0.376,)
# Learners that use no unlabelled images.
WITHOUT_UNLABELLED = ("Supervised", "cRT")
FEW, MANY = 20, 100  # labelled images: a class with more than MANY is many-shot, with fewer than FEW few-shot


@dataclass(frozen=True)
class TrainingData:
    """Everything read before training.

    valid, test: None where there is none. unlabelled: None for learners without. Its labels, where known, serve
    statistics only. generated: how many of the labelled images, the last ones, are those of DATASET.AUG_PATH.
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
    def real_counts(self) -> np.ndarray:
        """Labelled images of every class, without generated ones, int64 [K]."""
        return np.bincount(self.labelled.labels[:len(self.labelled) - self.generated], minlength=self.num_classes)


def load_data(cfg: Config) -> TrainingData:
    """Read and split the data set of the configuration; nothing is written. Raises UserError."""
    build: dict[str, Callable[[Config], TrainingData]] = {
        "cifar10": _cifar, "cifar100": _cifar, "stl10": _stl10, "digits": _digits, "semi_aves": _semi_aves}
    data = build[cfg.DATASET.NAME](cfg)
    if data.num_classes != cfg.MODEL.NUM_CLASSES:
        raise UserError(f"MODEL.NUM_CLASSES {cfg.MODEL.NUM_CLASSES}: {cfg.DATASET.NAME} has {data.num_classes} "
                        f"classes; set MODEL.NUM_CLASSES {data.num_classes}")
    if data.unlabelled is not None and len(data.unlabelled) == 0:
        raise UserError(f"{cfg.DATASET.NAME}: no unlabelled images; check NUM_UNLABELED_HEAD")
    return with_generated(data, cfg.DATASET.AUG_PATH) if cfg.DATASET.AUG_PATH else data


def with_generated(data: TrainingData, path: str) -> TrainingData:
    """Return the data with the images of a folder, zip or npz among the labelled ones; UserError."""
    labelled = data.labelled
    generated = read_images(path, resolution=labelled.size[0], channels=labelled.channels, num_classes=data.num_classes)
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
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"DATASET.ROOT: cannot create the folder {root}: {error.strerror}") from None
        return load_dataset(name, split, root, download=True)


def _cifar(cfg: Config) -> TrainingData:
    name = cfg.DATASET.NAME
    statistics = CIFAR100_STATISTICS if name == "cifar100" else CIFAR10_STATISTICS
    return _from_pool(cfg, _read(name, "train", cfg), _test(name, cfg), Look(*statistics, cfg.DATASET.RESOLUTION),
                      holdout_allowed=name == "cifar10")


def _digits(cfg: Config) -> TrainingData:
    """1,297 images of 8x8 to train on, for trying out: shifts of a pixel, no mirror images."""
    policy = WeakPolicy(flip=False, pad=1, pad_mode="zero")
    look = Look(*DIGITS_STATISTICS, cfg.DATASET.RESOLUTION, policy, cutout_side=3)
    return _from_pool(cfg, load_dataset("digits", "train"), _test("digits", cfg), look)


def _from_pool(cfg: Config, pool: ImageSet, test: ImageSet | None, look: Look,
               holdout_allowed: bool = True) -> TrainingData:
    """Split one pool into labelled, unlabelled and validation images."""
    tail, learner = cfg.long_tail, cfg.ALGORITHM.NAME
    uses = learner not in WITHOUT_UNLABELLED
    holdout = cfg.ALGORITHM.DARP_ESTIM.PER_CLASS_VALID_SAMPLES if learner == "DARP_ESTIM" and holdout_allowed else None
    found = select(pool.labels, pool.num_classes, cfg.SEED, head=tail.NUM_LABELED_HEAD, factor=tail.IMB_FACTOR_L,
                   num_valid=cfg.DATASET.NUM_VALID, unlabelled_head=max(0, tail.NUM_UNLABELED_HEAD),
                   unlabelled_factor=tail.IMB_FACTOR_UL if learner != "Supervised" else 1,
                   reverse=cfg.DATASET.REVERSE_UL_DISTRIBUTION, holdout=holdout)
    return TrainingData(pool.subset(found.labelled), pool.subset(found.unlabelled) if uses else None,
                        _some(pool, found.valid), test, look, pool.num_classes)


def _stl10(cfg: Config) -> TrainingData:
    """5,000 labelled images, thinned; all 100,000 unlabelled ones, whose classes are not known."""
    pool, tail, learner = _read("stl10", "train", cfg), cfg.DATASET.STL10, cfg.ALGORITHM.NAME
    holdout = cfg.ALGORITHM.DARP_ESTIM.PER_CLASS_VALID_SAMPLES if learner == "DARP_ESTIM" else None
    found = select(pool.labels, pool.num_classes, cfg.SEED, head=tail.NUM_LABELED_HEAD, factor=tail.IMB_FACTOR_L,
                   num_valid=cfg.DATASET.NUM_VALID, holdout=holdout)
    unlabelled = None if learner in WITHOUT_UNLABELLED else _read("stl10", "unlabeled", cfg)
    # Normalised by the numbers of CIFAR-10, as published.
    return TrainingData(pool.subset(found.labelled), unlabelled, _some(pool, found.valid), _test("stl10", cfg),
                        Look(*CIFAR10_STATISTICS, cfg.DATASET.RESOLUTION), pool.num_classes)


def _semi_aves(cfg: Config) -> TrainingData:
    side = cfg.DATASET.RESOLUTION
    found = load_semi_aves(Path(cfg.DATASET.ROOT), cfg.DATASET.SEMIAVES.UNLABELED, stored_side=side * 8 // 7,
                           with_unlabelled=cfg.ALGORITHM.NAME not in WITHOUT_UNLABELLED)
    look = Look(*IMAGENET_STATISTICS, side, WeakPolicy(pad=0, crop=side), cutout_side=side // 2)
    test = found.test if cfg.EVAL_ON_TEST_SET else None
    return TrainingData(found.labelled, found.unlabelled, found.valid, test, look, found.labelled.num_classes)


def _test(name: str, cfg: Config) -> ImageSet | None:
    if not cfg.EVAL_ON_TEST_SET:
        return None
    return load_dataset(name, "test") if name == "digits" else _read(name, "test", cfg)


def _some(pool: ImageSet, indices: np.ndarray) -> ImageSet | None:
    return pool.subset(indices) if len(indices) else None


def shots(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the classes [*] of each group, "many", "medium" and "few", by their labelled images [K].

    More than 100, 20 to 100, fewer than 20, as Liu et al. (CVPR 2019) divide ImageNet-LT. Where a data set is so small
    that a group is empty, the classes are divided into thirds by frequency.
    """
    order = np.argsort(-counts, kind="stable")
    groups = {"many": np.flatnonzero(counts > MANY), "medium": np.flatnonzero((counts >= FEW) & (counts <= MANY)),
              "few": np.flatnonzero(counts < FEW)}
    if all(len(group) for group in groups.values()):
        return groups
    thirds = np.array_split(order, 3)
    return dict(zip(groups, (np.sort(third) for third in thirds), strict=True))


def warn_of_queue(cfg: Config, feature_size: int) -> None:
    """Say that MODEL.QUEUE.FEAT_DIM is not what the network has; what the network has is used."""
    if cfg.MODEL.QUEUE.FEAT_DIM != feature_size and "DASO" in cfg.ALGORITHM.NAME:
        warnings.warn(f"MODEL.QUEUE.FEAT_DIM {cfg.MODEL.QUEUE.FEAT_DIM}: the network's features have {feature_size} "
                      "numbers; these are used", stacklevel=2)
