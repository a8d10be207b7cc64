"""Sources of images as the fixtures describe them, written to disk."""
from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_cifar_archive(path: Path, images: np.ndarray, labels: list | np.ndarray) -> None:
    """Write five batches of uint8 [N, 3072] rows and their labels under the published names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for k, rows in enumerate(np.array_split(np.arange(len(images)), 5), 1):
            batch = {"data": images[rows[0]:rows[-1] + 1], "labels": labels[rows[0]:rows[-1] + 1]}
            add_to_tar(archive, f"cifar-10-batches-py/data_batch_{k}", pickle.dumps(batch))


def write_source(folder: Path, source: dict[str, Any], note: str, pixels: dict[str, np.ndarray]) -> None:
    """Write the source of a converter case below `folder`; the notes of the fixtures give its pixels."""
    if source["kind"] == "cifar":
        _write_cifar(folder / source["path"], source)
    elif source["kind"] == "mnist":
        _write_mnist(folder / source["path"], source)
    elif source["kind"] == "folder":
        write_image_folder(folder, source, pixels)
    elif source["kind"] not in ("missing", "output of case"):
        raise ValueError(f"unknown kind of source: {source['kind']} ({note})")


def _write_cifar(path: Path, source: dict[str, Any]) -> None:
    if path.exists():
        return
    index, channel = np.arange(50_000)[:, None], np.arange(3)[None]
    values = (index * source["image_mult"] + channel * source["channel_mult"]) % 256
    rows = np.repeat(values.astype(np.uint8), 1024, axis=1)
    rows[:, 0], rows[:, 5] = index[:, 0] // 256 % 256, index[:, 0] % 256
    labels = (index[:, 0] * source["label_mult"] + source["label_add"]) % 10
    write_cifar_archive(path, rows, labels.tolist() if source["labels_as"] == "list" else labels)


def _write_mnist(path: Path, source: dict[str, Any]) -> None:
    if path.exists():
        return
    index = np.arange(60_000)
    images = np.repeat((index % 256).astype(np.uint8), 28 * 28).reshape(-1, 28, 28)
    images[:, 3, 4] = 255 - index % 200
    labels = (index * source["label_mult"] % 10).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_idx(path, images)
    write_idx(path.with_name("train-labels-idx1-ubyte.gz"), labels)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 data in the idx form, packed if the name says so."""
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    with (gzip.open(path, "wb", 1) if path.suffix == ".gz" else open(path, "wb")) as file:
        file.write(header + array.tobytes())


def write_image_folder(folder: Path, source: dict[str, Any], pixels: dict[str, np.ndarray]) -> None:
    """Write a folder of PNGs from the arrays `source:<path>`, with the dataset.json and other files listed."""
    root = folder / source["path"]
    shutil.rmtree(root, ignore_errors=True)
    for name in source["images"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[f"source:{name}"]).save(folder / name, "png")
    for name in source.get("other_files", ()):
        (root / name).write_text("not an image")
    if source.get("dataset_json") is not None:
        (root / "dataset.json").write_text(json.dumps(source["dataset_json"]))
