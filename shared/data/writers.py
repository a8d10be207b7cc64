"""Writing images: EDM's ZIP or folder, folders of classes, npz, single PNGs. Each appears complete or not at all."""
from __future__ import annotations

import glob
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.cli import UserError
from shared.data.classes import has_names
from shared.data.images import ImageSet, iterate
from shared.training.files import atomic, claim, make_dir, sweep

Save = Callable[[str, bytes], None]     # (name, content) -> None
WRITERS = 8                             # threads; compressing a PNG releases the interpreter lock


# --------------------------------------------------------------------------------------------------------------- PNGs

def to_pillow(pixels: np.ndarray) -> Image.Image:
    """Return uint8 [C, H, W] as an image of mode L, LA, RGB or RGBA, by C from 1 to 4."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def encode_png(image: Image.Image) -> bytes:
    """Return an uncompressed PNG, which is as quick to decode as a PNG can be."""
    stream = io.BytesIO()
    image.save(stream, format="png", compress_level=0)
    return stream.getvalue()


def encode_pngs(images: np.ndarray) -> list[bytes]:
    """Return the uncompressed PNG of each image of uint8 [n, C, H, W]."""
    return [encode_png(to_pillow(image)) for image in images]


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [C, H, W] as an L (C = 1) or RGB (C = 3) PNG."""
    with atomic(path) as file:
        to_pillow(pixels).save(file, format="png")


class PngWriter:
    """Writes images in threads while the next ones are computed. Each file appears complete or not at all.

    A context manager: leaving it waits for all files, and an error of any of them is raised here or in `save`.
    """

    def __enter__(self) -> PngWriter:
        self._pool = ThreadPoolExecutor(WRITERS)
        self._pending: list[Future] = []
        return self

    def save(self, images: Iterable[tuple[Path, np.ndarray]]) -> None:
        """Queue uint8 images [C, H, W], C = 1 or 3, once those of the former call are written."""
        self._wait()
        self._pending = [self._pool.submit(write_png, path, pixels) for path, pixels in images]

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=kind is not None)

    def _wait(self) -> None:
        for future in self._pending:
            future.result()


def read_pngs(paths: Sequence[Path]) -> np.ndarray:
    """Read images of one size as uint8 [N, C, H, W]."""
    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor(WRITERS) as pool:
        return np.stack(list(pool.map(read, paths)))


# --------------------------------------------------------------------------------------------------- ZIPs and folders

def image_name(index: int) -> str:
    """Return EDM's name of an image, a thousand to a folder: 00012/img00012345.png."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def labels_json(labels: Sequence[tuple[str, int | list[float] | None]], classes: Sequence[str] = (),
                further: Mapping[str, Any] | None = None) -> str:
    """Return the text of dataset.json: every name with its label, or null in place of all if one has none.

    classes: names in label order, written as `classes` unless they are numbers. further: other keys. Published readers
    of labels pass over both.
    """
    listed = [[name, label] for name, label in labels]
    unknown = any(label is None for _, label in listed)
    named = {"classes": list(classes)} if has_names(classes) and not unknown else {}
    return json.dumps({"labels": None if unknown else listed, **named, **(further or {})})


@contextmanager
def open_destination(dest: Path) -> Iterator[Save]:
    """Yield a function that adds a file to `dest`: a ZIP (entries stored as they are) or a folder.

    A folder must be empty or absent. `dest` appears when the block ends, and stays as it was after an error. The same
    files in the same order give the same bytes.
    """
    if dest.suffix.lower() == ".zip":
        sweep(dest.parent, glob.escape(dest.name))
        with atomic(dest) as file, zipfile.ZipFile(file, "w") as archive:
            # Without a date, which would make every file another one; readable and writable by its owner.
            yield lambda name, data: archive.writestr(_entry(name), data)
        return
    with whole_folder(dest, "--dest folder must be empty") as folder:
        made: set[str] = set()

        def save(name: str, data: bytes) -> None:
            parent = name.rpartition("/")[0]
            if parent not in made:
                (folder / parent).mkdir(parents=True, exist_ok=True)
                made.add(parent)
            (folder / name).write_bytes(data)

        yield save


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o600 << 16
    return info


@contextmanager
def whole_folder(dest: Path, problem: str = "the folder must be empty") -> Iterator[Path]:
    """Yield a temporary folder that becomes `dest` when the block ends without an error.

    Raises UserError, which begins with `problem`, unless `dest` is an empty folder or absent.
    """
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{problem}: {dest}")
    dest = dest.absolute()
    sweep(make_dir(dest.parent), glob.escape(dest.name))
    folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}.part-", dir=dest.parent))
    sign = os.open(folder, os.O_RDONLY)
    claim(sign)
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
        with suppress(OSError):
            dest.rmdir()
        try:
            os.rename(folder, dest)
        except OSError:
            raise UserError(f"{problem}: {dest}, which another process has filled meanwhile") from None
    finally:
        os.close(sign)
        shutil.rmtree(folder, ignore_errors=True)


def write_zip(images: ImageSet, path: str | Path) -> None:
    """Write EDM's form, a .zip or a folder: 00000/img00000000.png and so on, uncompressed, and dataset.json last, with
    the names of the classes.

    One image without a label makes all labels null there, which is how EDM says that a set has none.
    """
    names = [image_name(index) for index in range(len(images))]
    labels = images.labels.tolist() if images.vectors is None else images.vectors.tolist()
    with open_destination(Path(path)) as save:
        for name, png in zip(names, _all_pngs(images), strict=True):
            save(name, png)
        pairs = [(name, None if label == -1 else label) for name, label in zip(names, labels, strict=True)]
        save("dataset.json", labels_json(pairs, images.classes).encode())


def write_folder(images: ImageSet, path: str | Path) -> None:
    """Write <class>/<index>.png, the class as a number, into an empty or absent folder; every image needs a label."""
    if (images.labels < 0).any():
        raise UserError(f"{images.name}: {int((images.labels < 0).sum())} images have no label, so no class folder")
    digits = len(str(int(images.labels.max())))
    with whole_folder(Path(path)) as folder:
        for label in np.unique(images.labels):
            (folder / f"{label:0{digits}d}").mkdir()
        for index, (label, png) in enumerate(zip(images.labels, _all_pngs(images), strict=True)):
            (folder / f"{label:0{digits}d}" / f"{index:06d}.png").write_bytes(png)


def _all_pngs(images: ImageSet) -> Iterator[bytes]:
    for pixels, _ in iterate(images):
        yield from encode_pngs(pixels)


# ------------------------------------------------------------------------------------------------------------- arrays

def write_npz(images: ImageSet, path: str | Path) -> None:
    """Write `images`, `labels` and `classes`, uncompressed, streamed from a memory-mapped set."""
    with atomic(path) as file:
        np.savez(file, images=images.images, labels=images.labels, classes=np.array(images.classes, dtype=np.str_))
