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

from tests.golden.cases import whole


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
    if source["kind"] == "folder":
        write_image_folder(folder, source, pixels)
    elif source["kind"] in ("cifar", "mnist"):
        path, described = folder / source["path"], json.dumps(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = path.with_name("source.json")  # a file of 50,000 images is written again if it has to differ
        if not record.exists() or record.read_text() != described:
            (_write_cifar if source["kind"] == "cifar" else _write_mnist)(path, source, note)
            record.write_text(described)
    elif source["kind"] not in ("missing", "output of case"):
        raise ValueError(f"unknown kind of source: {source['kind']} ({note})")


def _count(source: dict[str, Any], note: str, usual: int) -> np.ndarray:
    return np.arange(source.get("count", whole(note, "# images", usual)))


def _labels(source: dict[str, Any], index: np.ndarray) -> np.ndarray:
    """Return the labels of a source: a multiple of the image's number, some of them replaced by others."""
    labels = (index * source["label_mult"] + source.get("label_add", 0)) % source.get("classes", 10)
    replaced = labels.copy()
    for old, new in replacements(source.get("replace_label")):
        replaced[labels == old] = new
    return replaced


def replacements(given: Any) -> list[tuple[int, int]]:
    """Return (label, what it becomes) of [from, to], several such pairs, {"from": .., "to": ..} or {from: to}."""
    if not given:
        return []
    if isinstance(given, dict):
        pairs = [(given["from"], given["to"])] if given.keys() == {"from", "to"} else given.items()
    else:
        pairs = given if isinstance(given[0], list) else [given]
    return [(int(old), int(new)) for old, new in pairs]


def _write_cifar(path: Path, source: dict[str, Any], note: str) -> None:
    index, channel = _count(source, note, 50_000)[:, None], np.arange(3)[None]
    values = (index * source["image_mult"] + channel * source["channel_mult"]) % 256
    rows = np.repeat(values.astype(np.uint8), 1024, axis=1)
    rows[:, 0], rows[:, 5] = index[:, 0] // 256 % 256, index[:, 0] % 256
    labels = _labels(source, index[:, 0])
    write_cifar_archive(path, rows, labels.tolist() if source.get("labels_as", "list") == "list" else labels)


def _write_mnist(path: Path, source: dict[str, Any], note: str) -> None:
    index = _count(source, note, 60_000)
    images = np.repeat((index % 256).astype(np.uint8), 28 * 28).reshape(-1, 28, 28)
    images[:, 3, 4] = 255 - index % 200
    write_idx(path, images)
    write_idx(path.with_name(path.name.replace("images-idx3", "labels-idx1")), _labels(source, index).astype(np.uint8))


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
