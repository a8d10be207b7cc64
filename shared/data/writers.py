"""Writing image sets: EDM's ZIP, CIFAR's batches, folders of classes, npz. Each appears complete or not at all."""
from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.cli import UserError
from shared.data.cifar import CIFAR10, CIFAR100, SIDE, Layout
from shared.data.images import ImageSet, iterate, shape_text
from shared.training.files import atomic, make_dir

Save = Callable[[str, bytes], None]     # (name, content) -> None


def encode_pngs(images: np.ndarray) -> list[bytes]:
    """Return the PNG of each image of uint8 [n, C, H, W]: gray, gray with transparency, RGB or RGBA by C from 1 to 4.

    Neither compressed nor filtered, which is as quick to decode as a PNG can be; as quick to make as a copy.
    """
    n, channels, height, width = images.shape
    header = struct.pack(">2I5B", width, height, 8, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = np.zeros((n, height, 1 + width * channels), np.uint8)  # the first byte of a row tells its filter: 0, none
    for channel in range(channels):
        rows[:, :, 1 + channel::channels] = images[:, channel]
    start = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header)
    end = _png_chunk(b"IEND", b"")
    return [start + _png_chunk(b"IDAT", zlib.compress(raw, 0)) + end for raw in rows]


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def image_name(index: int) -> str:
    """Return EDM's name of an image, a thousand to a folder: 00012/img00012345.png."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def labels_json(labels: Sequence[tuple[str, int | list[float] | None]],
                further: Mapping[str, Any] | None = None) -> str:
    """Return the text of dataset.json: every name with its label, or null in place of all if one has none.

    further: other keys, which readers of labels pass over.
    """
    listed = [[name, label] for name, label in labels]
    return json.dumps({"labels": None if any(label is None for _, label in listed) else listed, **(further or {})})


class StoredZip:
    """A ZIP whose entries are stored as they are, written front to back.

    Several times quicker than zipfile, which goes back to each entry's header: with small images that is what a
    converter would wait for. The same entries give the same bytes.
    """

    DATE = (1 << 5) | 1                 # 1980-01-01
    OWNER_READS_AND_WRITES = 0o600 << 16
    LIMIT = 0xFFFFFFFF                  # beyond which an offset needs the ZIP64 form

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.offset, self.directory = file, 0, []

    def add(self, name: str, data: bytes) -> None:
        raw, extra, version = name.encode("ascii"), b"", 20
        common = (0, 0, 0, self.DATE, zlib.crc32(data), len(data), len(data), len(raw))
        if self.offset >= self.LIMIT:
            extra, version = struct.pack("<HHQ", 1, 8, self.offset), 45
        self.directory.append(
            struct.pack("<4sBBH4H3I5H2I", b"PK\1\2", version, 3, version, *common, len(extra), 0, 0, 0,
                        self.OWNER_READS_AND_WRITES, min(self.offset, self.LIMIT)) + raw + extra)
        self.offset += self.file.write(struct.pack("<4sH4H3I2H", b"PK\3\4", 20, *common, 0) + raw + data)

    def finish(self) -> None:
        """Write the directory."""
        count, size = len(self.directory), sum(map(len, self.directory))
        self.file.writelines(self.directory)
        if count >= 0xFFFF or self.offset + size >= self.LIMIT:
            self.file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, self.offset))
            self.file.write(struct.pack("<4sIQI", b"PK\6\7", 0, self.offset + size, 1))
        self.file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), size,
                                    min(self.offset, self.LIMIT), 0))


@contextmanager
def open_destination(dest: Path) -> Iterator[Save]:
    """Yield a function that adds a file to `dest`: a ZIP (entries stored as they are) or a folder.

    A folder must be empty or absent. `dest` appears when the block ends, and stays as it was after an error.
    """
    if dest.suffix.lower() == ".zip":
        with atomic(dest) as file:
            archive = StoredZip(file)
            yield archive.add
            archive.finish()
        return
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"--dest folder must be empty: {dest}")
    with whole_folder(dest) as folder:
        made: set[str] = set()

        def save(name: str, data: bytes) -> None:
            parent = name.rpartition("/")[0]
            if parent not in made:
                (folder / parent).mkdir(parents=True, exist_ok=True)
                made.add(parent)
            (folder / name).write_bytes(data)

        yield save


@contextmanager
def whole_folder(dest: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `dest` (empty or absent) when the block ends without an error."""
    dest = dest.absolute()
    folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}.part-", dir=make_dir(dest.parent)))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        if dest.exists():
            dest.rmdir()
        os.rename(folder, dest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_zip(images: ImageSet, path: str | Path) -> None:
    """Write EDM's form, a .zip or a folder: 00000/img00000000.png and so on, uncompressed, and dataset.json last.

    One image without a label makes all labels null there, which is how EDM says that a set has none.
    """
    dest, names = Path(path), []
    labels = images.labels.tolist() if images.vectors is None else images.vectors.tolist()
    with open_destination(dest) as save:
        for pixels, _ in iterate(images):
            for png in encode_pngs(pixels):
                names.append(image_name(len(names)))
                save(names[-1], png)
        pairs = [(name, None if label == -1 else label) for name, label in zip(names, labels, strict=True)]
        save("dataset.json", labels_json(pairs).encode())


def write_folder(images: ImageSet, path: str | Path) -> None:
    """Write <class>/<index>.png, the class as a number, into an empty or absent folder; every image needs a label."""
    if (images.labels < 0).any():
        raise UserError(f"{images.name}: {int((images.labels < 0).sum())} images have no label, so no class folder")
    if Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise UserError(f"the folder must be empty: {path}")
    digits = len(str(int(images.labels.max())))
    with whole_folder(Path(path)) as folder:
        for label in np.unique(images.labels):
            (folder / f"{label:0{digits}d}").mkdir()
        index = 0
        for pixels, labels in iterate(images):
            for png, label in zip(encode_pngs(pixels), labels, strict=True):
                (folder / f"{label:0{digits}d}" / f"{index:06d}.png").write_bytes(png)
                index += 1


def write_npz(images: ImageSet, path: str | Path) -> None:
    """Write `images`, `labels` and `classes`, uncompressed, streamed from a memory-mapped set."""
    with atomic(path) as file:
        np.savez(file, images=images.images, labels=images.labels, classes=np.array(images.classes, dtype=np.str_))


def cifar_batches(images: np.ndarray, labels: np.ndarray, names: Sequence[str], layout: Layout) -> Iterator[
        tuple[str, bytes]]:
    """Yield (name, content) of CIFAR batches: equal shares of images uint8 [N, 3, 32, 32] with int64 labels."""
    for name, rows in zip(names, np.array_split(np.arange(len(images)), len(names)), strict=True):
        data = np.ascontiguousarray(images[rows[0]:rows[-1] + 1]).reshape(len(rows), -1)
        yield name, pickle.dumps({"data": data, layout.labels: labels[rows]}, protocol=4)


def write_cifar(train: ImageSet, folder: str | Path, test: ImageSet | None = None) -> None:
    """Write CIFAR-10's (10 classes) or CIFAR-100's python batches of 32x32 RGB images, with their meta file."""
    layout = CIFAR10 if train.num_classes == 10 else CIFAR100
    if train.num_classes != layout.num_classes or train.images.shape[1:] != (3, SIDE, SIDE):
        raise UserError(f"{train.name}: CIFAR batches hold 10 or 100 classes of 3 x 32 x 32 images, not "
                        f"{train.num_classes} of {shape_text(train)}")
    folder = make_dir(folder)
    parts = [(train, layout.train)] + ([(test, layout.test)] if test is not None else [])
    for part, names in parts:
        for name, content in cifar_batches(part.images, part.labels, names, layout):
            with atomic(folder / name) as file:
                file.write(content)
    with atomic(folder / layout.meta) as file:
        pickle.dump({layout.label_names: list(train.classes)}, file, protocol=4)
