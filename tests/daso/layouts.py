"""Files in the form of the published data sets, with random pictures."""
from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def write_cifar(root: Path, name: str, per_class: int, test_per_class: int = 2) -> Path:
    """Write CIFAR-10 or CIFAR-100 with so many images a class below `root`; return it."""
    classes = 10 if name == "cifar10" else 100
    folder = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    parts = [f"data_batch_{k}" for k in range(1, 6)] if name == "cifar10" else ["train"]
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    for part, chunk in zip(parts, np.array_split(labels, len(parts)), strict=True):
        _write_batch(folder / part, chunk, key, rng)
    _write_batch(folder / ("test_batch" if name == "cifar10" else "test"),
                 np.repeat(np.arange(classes), test_per_class), key, rng)
    names = {"label_names": [f"class{c}" for c in range(classes)],
             "fine_label_names": [f"class{c}" for c in range(classes)]}
    (folder / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(names))
    return root


def _write_batch(path: Path, labels: np.ndarray, key: str, rng: np.random.Generator) -> None:
    # One random row for all images of a class: what a picture shows does not matter here, how many there are does.
    rows = rng.integers(0, 256, (100, 3072), dtype=np.uint8)[labels]
    path.write_bytes(pickle.dumps({"data": rows, key: labels.tolist()}))


def write_stl10(root: Path, per_class: int = 500, unlabelled: int = 300) -> Path:
    """Write STL-10 with so many labelled images a class and unlabelled ones; return `root`."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    labels = np.tile(np.arange(1, 11, dtype=np.uint8), per_class)
    with open(folder / "train_X.bin", "wb") as file:
        file.truncate(len(labels) * 3 * 96 * 96)
    (folder / "train_y.bin").write_bytes(labels.tobytes())
    rng = np.random.default_rng(1)
    (folder / "test_X.bin").write_bytes(rng.integers(0, 256, (10, 3, 96, 96), dtype=np.uint8).tobytes())
    (folder / "test_y.bin").write_bytes(np.arange(1, 11, dtype=np.uint8).tobytes())
    (folder / "unlabeled_X.bin").write_bytes(rng.integers(0, 256, (unlabelled, 3, 96, 96), dtype=np.uint8).tobytes())
    return root


def write_semi_aves(root: Path, species: int = 3, others: int = 2) -> Path:
    """Write a few photographs of different sizes with the lists of Semi-Aves; return `root`."""
    rng, lists = np.random.default_rng(2), {}
    for name, labels in (("l_train", range(species)), ("val", range(species)), ("test", range(species)),
                         ("u_train_in", range(species)), ("u_train_out", range(species, species + others))):
        for label in labels:
            for number in range(4):
                path = Path("photographs") / str(label) / f"{name}_{number}.jpg"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                size = (60 + 7 * number, 50 + 5 * label)
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / path)
                lists.setdefault(name, []).append(f"{path.as_posix()} {label}")
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root
