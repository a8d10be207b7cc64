"""Small data sets in the form of CIFAR's python batches."""
from __future__ import annotations

import pickle
from pathlib import Path

from shared.data.formats import CIFAR10, CIFAR100, cifar_batches
from shared.data.images import ImageSet


def write_cifar(train: ImageSet, folder: Path, test: ImageSet | None = None) -> None:
    """Write the batches of CIFAR-10 (10 classes) or CIFAR-100, with their meta file, of 3 x 32 x 32 images."""
    layout = {10: CIFAR10, 100: CIFAR100}[train.num_classes]
    folder.mkdir(parents=True)
    for part, names in [(train, layout.train)] + ([(test, layout.test)] if test is not None else []):
        for name, content in cifar_batches(part.images, part.labels, names, layout):
            (folder / name).write_bytes(content)
    (folder / layout.meta).write_bytes(pickle.dumps({layout.label_names: list(train.classes)}))
