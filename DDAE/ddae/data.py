"""The data sets of DDAE by their published names, and any other set of the suite by name or path."""
from __future__ import annotations

import os
from pathlib import Path

from DDAE.ddae.tiny_imagenet import load_tiny_imagenet
from shared.cli import UserError, nearest
from shared.data.datasets import NAMES, load_dataset
from shared.data.images import ImageSet, shape_text

PUBLISHED = {"cifar": "cifar10", "cifar100": "cifar100"}


def load_images(dataset: str, split: str, data_dir: str | os.PathLike = "./data") -> ImageSet:
    """Return the split "train" or "test": of cifar, cifar100, tiny (below `data_dir`), digits, or a folder or file.

    Decoded once, then memory-mapped. Raises UserError for an unknown name, and missing or damaged files.
    """
    if dataset == "tiny":
        return load_tiny_imagenet(data_dir, split)
    if dataset not in PUBLISHED and dataset not in NAMES and not Path(dataset).exists():
        known = (*PUBLISHED, "tiny", "digits")
        raise UserError(f"dataset {dataset!r}: expected {', '.join(known)}, or a folder or file of images"
                        f"{nearest(dataset, known)}")
    return load_dataset(PUBLISHED.get(dataset, dataset), split, data_dir)


def check_fits(images: ImageSet, image_shape: list[int] | tuple[int, ...], classes: int) -> None:
    """Raise UserError if the images are not of the network's shape (channels, height, width), or of more classes."""
    if (images.channels, *images.size) != tuple(image_shape):
        raise UserError(f"{images.name}: images of {shape_text(images)}, but the configuration's image_shape is "
                        f"{' x '.join(map(str, image_shape))}")
    if images.num_classes > classes:
        raise UserError(f"{images.name}: {images.num_classes} classes, but the configuration has classes: {classes}")
