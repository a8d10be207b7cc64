"""The data sets of DDAE, and the batch of a step: a function of (seed, step) alone, on any number of ranks."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.augment.views import WeakPolicy, draw_weak, shift_whole
from shared.cli import UserError, nearest
from shared.data.cache import Allocate, Stored, cached, rank_part
from shared.data.classes import ImageFiles, find_images
from shared.data.datasets import NAMES, load_dataset
from shared.data.images import ImageSet, decode, shape_text
from shared.data.listing import read_lines
from shared.data.pool import Pool
from shared.distributed import World
from shared.training.fingerprint import fingerprint
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng, torch_rng

PUBLISHED = {"cifar": "cifar10", "cifar100": "cifar100"}
TINY, TINY_CLASSES, TINY_SUFFIX = "tiny-imagenet-200", 200, ".JPEG"


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


def check_fits(images: ImageSet, image_shape: Sequence[int], classes: int) -> None:
    """Raise UserError if the images are not of the network's shape (channels, height, width), or of more classes."""
    if (images.channels, *images.size) != tuple(image_shape):
        raise UserError(f"{images.name}: images of {shape_text(images)}, but the configuration's image_shape is "
                        f"{' x '.join(map(str, image_shape))}")
    if images.num_classes > classes:
        raise UserError(f"{images.name}: {images.num_classes} classes, but the configuration has classes: {classes}")


# ---------------------------------------------------------------- Tiny-ImageNet

def load_tiny_imagenet(data_dir: str | os.PathLike, split: str) -> ImageSet:
    """Return "train" (100,000) or "test" (the 10,000 of val), 64x64 RGB, memory-mapped from the cache; UserError."""
    root = tiny_root(data_dir)
    parts = (root / "train",) if split == "train" else (root / "val" / "images", root / "val" / "val_annotations.txt")

    def build(allocate: Allocate) -> Stored:
        files, labels, names = scan(root, split)
        return Stored(decode(files, 3, allocate), labels, tuple(names))

    stored = cached("tiny", ["tiny", split, fingerprint(*parts)], build)
    return ImageSet(stored.images, stored.labels, stored.classes, f"tiny {split}")


def tiny_root(data_dir: str | os.PathLike) -> Path:
    """Return the folder tiny-imagenet-200 in `data_dir`, or `data_dir` itself if it is that folder; UserError."""
    root = Path(data_dir)
    root = root if root.name == TINY else root / TINY
    if not root.is_dir():
        raise UserError(f"tiny: {root} not found; unpack {TINY}.zip there")
    return root


def scan(data_dir: str | os.PathLike, split: str) -> tuple[ImageFiles, np.ndarray, list[str]]:
    """Return (files, int64 labels, class names) of the split "train" or "test" (the folder val), decoding nothing.

    Training images come class by class, inside a class in the order of their paths as text; validation images in the
    order of their names as text, labelled by val_annotations.txt.
    """
    root = tiny_root(data_dir)
    train, val = root / "train", root / "val"
    names = sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else []
    if len(names) != TINY_CLASSES:
        raise UserError(f"{train}: expected {TINY_CLASSES} class folders, found {len(names)}")
    label_of = {name: label for label, name in enumerate(names)}
    files = find_images(train if split == "train" else val / "images")
    members = [member for member in files.members if member.name.endswith(TINY_SUFFIX)]
    if split == "train":
        members = [member for member in members if member.name.partition("/")[0] in label_of]
        # Folder by folder, as text; the files of a folder before those of its sub-folders.
        members.sort(key=lambda m: (m.name.partition("/")[0], *m.name.rpartition("/")[::2]))
        labels = [label_of[member.name.partition("/")[0]] for member in members]
    else:
        listed = _annotations(val / "val_annotations.txt", label_of)
        members = [member for member in members if "/" not in member.name]
        if missing := [member.name for member in members if member.name not in listed]:
            raise UserError(f"{val}: {missing[0]} is not listed in val_annotations.txt")
        labels = [listed[member.name] for member in members]
    return ImageFiles(files.path, tuple(members), {}), np.array(labels, np.int64), names


def _annotations(path: Path, label_of: dict[str, int]) -> dict[str, int]:
    """Return file name -> label of a tab-separated list of file, WordNet id and a box."""
    rows = [(number, line.split("\t")) for number, line in read_lines(path)]
    for number, row in rows:
        if len(row) < 2 or row[1].strip() not in label_of:
            raise UserError(f"{path}: line {number}: expected a file and one of the training set's class folders, "
                            f"separated by a tab, got {' '.join(row)[:80]!r}")
    return {row[0]: label_of[row[1].strip()] for _, row in rows}


# ---------------------------------------------------------------- batches

@dataclass(frozen=True)
class Batch:
    """One rank's part of the global batch of a step, on its device.

    images: float32 [n, C, H, W] in [0, 1]. labels: int64 [n]. items: int64 [n] on the host, positions in the data set.
    part: places in the global batch. count: images in the global batch.
    """

    images: Tensor
    labels: Tensor
    items: np.ndarray
    part: slice
    count: int

    @property
    def fraction(self) -> float:
        """This rank's fraction of the global batch, the weight of its mean loss."""
        return len(self.items) / self.count

    def noise(self, seed: int, step: int, purpose: str) -> Tensor:
        """Return this rank's part of standard normal noise for the global batch, of the images' shape."""
        device = self.images.device
        whole = torch.randn(self.count, *self.images.shape[1:], generator=torch_rng(seed, step, purpose, device),
                            device=device)
        return whole[self.part]

    def slice(self, start: int, stop: int) -> Batch:
        """Return the images start..stop - 1, counted from the first of these."""
        places = slice(self.part.start + start, min(self.part.start + stop, self.part.stop))
        return Batch(self.images[start:stop], self.labels[start:stop], self.items[start:stop], places, self.count)


class TrainBatches:
    """Batches of a data set in a new random order each epoch, the last one of an epoch being shorter.

    size: images in the global batch. flip: mirror half of them. pad: black margin in pixels of an image
    before it is cropped. Raises UserError for a size that leaves a rank without an image.
    """

    def __init__(self, images: ImageSet, size: int, world: World, seed: int, flip: bool = True, pad: int = 4) -> None:
        if size < world.size:
            raise UserError(f"a batch of {size} cannot be shared by {world.size} processes")
        if 0 < len(images) % size < world.size:
            raise UserError(f"{len(images)} images in batches of {size} leave {len(images) % size} for the last one, "
                            f"fewer than the {world.size} processes; choose another batch size")
        self.pool, self.world, self.seed = Pool(images, (0.0,), (1.0,), world.device), world, seed
        self.count, self.size, self.shape, self.classes = len(images), size, images.size, list(images.classes)
        self.policy = WeakPolicy(flip=flip, pad=pad, pad_mode="zero")
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def per_epoch(self) -> int:
        return -(-self.count // self.size)

    def items(self, step: int) -> np.ndarray:
        """Return the positions of the global batch of `step`, which lies in epoch step // per_epoch."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, numpy_rng(self.seed, epoch, "order").permutation(self.count)
        return self._order[1][place * self.size:(place + 1) * self.size]

    def __call__(self, step: int) -> Batch:
        """Return this rank's part of the batch of `step`."""
        return self._rows(step, rank_part(len(self.items(step)), self.world))

    def mirrored(self, step: int) -> Batch:
        """Return the images at the mirrored places of the global batch, the last for the first; its part runs back."""
        count = len(self.items(step))
        part = rank_part(count, self.world)
        first, stop = count - 1 - part.start, count - 1 - part.stop
        return self._rows(step, slice(first, stop if stop >= 0 else None, -1))

    def _rows(self, step: int, part: slice) -> Batch:
        items = self.items(step)
        draws = draw_weak(len(items), numpy_rng(self.seed, step, "augment"), self.shape, self.policy)
        chosen = items[part]
        images = self.pool.take(chosen)
        if self.policy.flip or self.policy.pad:
            images = shift_whole(images, draws[part])
        labels = self.pool.labels[to_device(chosen, self.pool.device)]
        return Batch(images.float().div_(255), labels, chosen, part, len(items))


class TestItems:
    """A data set in its own order, as it is, divided among ranks; every item exactly once."""

    __test__ = False  # no test class

    def __init__(self, images: ImageSet, size: int, world: World, seed: int) -> None:
        self.pool, self.size, self.world, self.seed = Pool(images, (0.0,), (1.0,), world.device), size, world, seed
        self.part = rank_part(len(images), world)
        self.starts = range(self.part.start, self.part.stop, size)

    def __len__(self) -> int:
        """Return the number of items of all ranks."""
        return len(self.pool)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's items in batches of at most `size`."""
        for start in self.starts:
            items = np.arange(start, min(start + self.size, self.part.stop))
            images = self.pool.take(items).float().div_(255)
            labels = self.pool.labels[to_device(items, self.pool.device)]
            yield Batch(images, labels, items, slice(items[0], items[-1] + 1), len(self.pool))

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        """Return standard normal noise for the batch's images: a function of (seed, item, purpose) alone."""
        return to_device(item_noise(self.seed, batch.items, batch.images.shape[1:], purpose), batch.images.device)


def item_noise(seed: int, items: np.ndarray, shape: Sequence[int], purpose: str) -> Tensor:
    """Return standard normal noise [len(items), *shape] on the host, row i from (seed, items[i], purpose)."""
    return torch.stack([torch.randn(*shape, generator=torch_rng(seed, int(item), purpose)) for item in items])
