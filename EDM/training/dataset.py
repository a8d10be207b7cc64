"""The training set of EDM: a folder or ZIP of square images, with one-hot or vector labels."""
from __future__ import annotations

import errno
import os
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shared.cli import UserError
from shared.data.image_files import LABEL_FILE
from shared.data.images import read_images


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Images with conditioning labels; item i is image `indices[i]`, mirrored left to right where `flipped[i]`.

    images: uint8 [N, C, R, R], memory-mapped; without mirrored copies.
    raw_labels: int64 [N] (class numbers), float32 [N, D] (vectors as in dataset.json) or float32 [N, 0] (no labels).
    indices: int64 [items]; after max_size and xflip.
    flipped: bool [items].
    label_dim: width of the network's label input; number of classes, D, or 0.
    name: base name of the path without its last extension.
    """

    images: np.ndarray
    raw_labels: np.ndarray
    indices: np.ndarray
    flipped: np.ndarray
    label_dim: int
    name: str

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (uint8 [C, R, R], float32 [label_dim]) of one item."""
        image = self.images[self.indices[item]]
        return (image[:, :, ::-1] if self.flipped[item] else image).copy(), self.conditions(self.indices[item])

    def conditions(self, indices: np.ndarray | int) -> np.ndarray:
        """Return the float32 [..., label_dim] network input of the images at `indices` (of the images, not items)."""
        labels = self.raw_labels[indices]
        if not self.has_onehot_labels:
            return labels
        return (np.arange(self.label_dim) == np.asarray(labels)[..., None]).astype(np.float32)

    @cached_property
    def labels(self) -> np.ndarray:
        """float32 [N, label_dim]: the network input of every image."""
        return self.conditions(np.arange(len(self.images)))

    @property
    def num_channels(self) -> int:
        return self.images.shape[1]

    @property
    def resolution(self) -> int:
        return self.images.shape[2]

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def has_onehot_labels(self) -> bool:
        return self.raw_labels.dtype == np.int64

    def details(self, item: int) -> dict[str, object]:
        """Return which image an item is, whether it is mirrored, and its label as dataset.json has it."""
        index = self.indices[item]
        return {"raw_idx": int(index), "xflip": bool(self.flipped[item]), "raw_label": self.raw_labels[index].tolist()}


def open_training_set(path: str | os.PathLike, use_labels: bool = False, max_size: int | None = None,
                      xflip: bool = False, seed: int = 0, resolution: int | None = None) -> TrainingSet:
    """Open a folder, ZIP or npz of equal square images (shared/data/images.py says which forms there are).

    use_labels: take the labels of dataset.json, or of class sub-folders; every image must have one. A set without any
        label gives label_dim 0, which the caller must not take for a conditional set.
    max_size: keep that many images, drawn with `seed`, in their order.
    xflip: append a mirrored copy of every kept image, which doubles the length.

    The label width is the largest class that occurs plus one, unless the set names its classes (sub-folders, npz).
    Raises UserError for what cannot be read, images that are not square or not `resolution`, and missing labels.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(str(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)))
    if not (os.path.isdir(path) or path.lower().endswith((".zip", ".npz"))):
        raise UserError(f"{path}: Path must point to a directory or zip")
    images = read_images(path, resolution=resolution)
    if images.size[0] != images.size[1]:
        raise UserError(f"{path}: the images are {images.size[1]}x{images.size[0]}, but must be square; "
                        "see dataset_tool.py --transform")
    raw_labels, label_dim = np.zeros((len(images), 0), np.float32), 0
    if use_labels and images.vectors is not None:
        raw_labels, label_dim = images.vectors, images.vectors.shape[1]
    elif use_labels and images.has_labels:
        raw_labels, label_dim = images.labels, images.num_classes
        if missing := int((raw_labels < 0).sum()):
            raise UserError(f"{path}: {missing} of {len(images)} images have no label; label them all, or train "
                            "without labels (--cond=0)")
        if os.path.exists(os.path.join(path, "00000", "img00000000.png")) and not os.path.exists(
                os.path.join(path, LABEL_FILE)):
            warnings.warn(f"{path}: without {LABEL_FILE} the folders count as classes, but these are named as "
                          "dataset_tool.py numbers images, a thousand to a folder", stacklevel=2)
        if absent := sorted(set(range(label_dim)) - set(raw_labels.tolist())):
            warnings.warn(f"{path}: no image of class {', '.join(map(str, absent[:10]))}: the network cannot learn it",
                          stacklevel=2)
    indices = np.arange(len(images))
    if max_size is not None and max_size < len(images):
        # The published order of draws, so that a subset holds the same images everywhere.
        np.random.RandomState(seed % (1 << 31)).shuffle(indices)
        indices = np.sort(indices[:max_size])
    flipped = np.zeros(len(indices), bool)
    if xflip:
        indices, flipped = np.tile(indices, 2), np.repeat([False, True], len(indices))
    name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
    return TrainingSet(images.images, raw_labels, indices, flipped, label_dim, name)
