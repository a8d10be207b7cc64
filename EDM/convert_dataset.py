"""Any source of images -> the ZIP or folder of uncompressed PNGs with a dataset.json that EDM trains on.

Images stream from the source through one process per core into the destination: no more than a few hundred are held.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from shared.cli import UserError
from shared.data.archives import Member, read_members
from shared.data.cifar import CIFAR10, CIFAR100, Layout, read_batches, read_mnist
from shared.data.datasets import load_dataset
from shared.data.image_files import class_values, find_images, listed_labels, open_image
from shared.data.images import iterate, read_images
from shared.data.parallel import one_ahead, ordered_map
from shared.data.writers import encode_pngs, image_name, labels_json, open_destination
from shared.training.files import make_dir
from shared.training.progress import Progress

CHUNK = 128  # images a worker prepares at a time
TRANSFORMS = ("center-crop", "center-crop-wide")
DIGITS = "digits"  # scikit-learn's, part of the package: the one data set that is no file
CIFAR = {layout.archive: layout for layout in (CIFAR10, CIFAR100)}
CIFAR_TRAIN, CIFAR_TEST = 50_000, 10_000
MNIST_TRAIN, MNIST_TEST = "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"
Label = int | list[float] | None
# The labels of the written images, in their order -> the labels to write, and further keys of dataset.json.
Relabel = Callable[[list[tuple[str, Label]]], tuple[list[tuple[str, Label]], dict[str, Any]]]


class Target(NamedTuple):
    """What every image becomes. size: (width, height) in pixels, or None to keep each as it is."""

    transform: str | None = None
    size: tuple[int, int] | None = None


class _Chunk(NamedTuple):
    """Consecutive source images, in one of three forms: members of `path`, file contents, or pixels [n, C, H, W]."""

    start: int
    labels: list[Label]
    path: Path
    members: tuple[Member, ...] = ()
    contents: tuple[bytes, ...] = ()
    pixels: np.ndarray | None = None
    target: Target = Target()

    @property
    def stays(self) -> bool:
        """Whether these are pixels that become files as they are."""
        transform, size = self.target
        return self.pixels is not None and transform is None and size in (None, self.pixels.shape[:1:-1])

    def images(self) -> Iterator[Image.Image | UserError]:
        """Decode; a damaged one of `contents` yields its error, one of `members` raises it."""
        if self.pixels is not None:
            for image in self.pixels:
                yield Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)) if len(image) == 3 else image[0])
        for member, data in zip(self.members, read_members(self.path, self.members), strict=True):
            yield open_image(data, f"{self.path}/{member.name}")
        for index, data in enumerate(self.contents, self.start):
            try:
                yield open_image(data, f"{self.path}: entry {index}")
            except UserError as error:
                yield error


class _Prepared(NamedTuple):
    index: int                      # of the source image
    label: Label
    png: bytes = b""                # empty: left out
    shape: tuple[int, int, int] = (0, 0, 0)     # width, height, channels
    problem: str = ""               # why it was left out, if it could not be decoded


def convert(source: str | os.PathLike, dest: str | os.PathLike, max_images: int | None = None,
            transform: str | None = None, resolution: tuple[int, int] | None = None, *, test_split: bool = False,
            relabel: Relabel | None = None) -> None:
    """Write the images of `source` to `dest`, a .zip file or a folder that is empty or absent.

    source: a folder; a folder ending in _lmdb; cifar-10-python.tar.gz or cifar-100-python.tar.gz (its fine labels);
        train-images-idx3-ubyte.gz or t10k-images-idx3-ubyte.gz with its labels beside it; a .zip; or an .npz with
        images and labels; or "digits", scikit-learn's. Images are taken in path order, at most `max_images`.
    transform: None resizes to `resolution` (width, height) if given; "center-crop" takes the middle square first;
        "center-crop-wide" takes the middle of that aspect ratio, leaves out images that are too small, and puts the
        result on a black square. The last two make gray images RGB.
    test_split: take the test images of a CIFAR archive or of the digits.
    relabel: what happens to the labels before they are written.

    The destination appears when it is complete, and not at all after an error. Raises UserError for what cannot be
    read, and for images that end up unequal, not square, not gray or RGB, or of a side that is no power of two (from
    an .npz: no multiple of 4).
    """
    _check_arguments(source, dest, max_images, transform, resolution)
    source, dest, target = Path(source), Path(dest), Target(transform, resolution)
    if test_split and source.name not in (*CIFAR, MNIST_TEST) and str(source) != DIGITS:
        raise UserError(f"--eval takes the test images of {', '.join(CIFAR)} or {DIGITS}; {source} has one part: leave "
                        f"it out (MNIST's test images are the source {MNIST_TEST})")
    total, chunks = _open_source(source, test_split)
    make_dir(dest.absolute().parent)
    progress = Progress(f"converting {source.name}", min(total, max_images or total), "images")
    check = _Checks(any_side=source.suffix == ".npz")
    labels: list[tuple[str, Label]] = []
    chunks = (chunk._replace(target=target) for chunk in _first(chunks, max_images))
    head = list(islice(chunks, 1))
    # Pixels that stay as they are would take longer to another process and back than to their file.
    workers = 1 if head and head[0].stays else None
    with open_destination(dest) as save:
        try:
            for prepared in ordered_map(_prepare, chain(head, chunks), workers):
                for image in prepared:
                    progress.advance()
                    if not image.png:
                        check.left_out(image)
                        continue
                    name = image_name(image.index)
                    check.accept(name, image)
                    save(name, image.png)
                    labels.append((name, image.label))
        finally:
            progress.close()
        if not labels:
            raise UserError(f"{source}: no image is left: all are smaller than {resolution} or damaged")
        written, further = relabel(labels) if relabel is not None else (labels, {})
        save("dataset.json", labels_json(written, further).encode())
    check.finish(source, labels)


def _check_arguments(source: str | os.PathLike, dest: str | os.PathLike, max_images: int | None, transform: str | None,
                     resolution: tuple[int, int] | None) -> None:
    if not os.fspath(dest):
        raise UserError("--dest output filename or directory must not be an empty string")
    if max_images is not None and max_images < 1:
        raise UserError(f"--max-images must be at least 1, got {max_images}")
    if transform is not None and resolution is None:
        raise UserError(f"must specify --resolution=WxH when using {transform} transform")
    if transform == "center-crop-wide" and resolution[1] > resolution[0]:
        raise UserError(f"--resolution={resolution[0]}x{resolution[1]} is not wide, as center-crop-wide needs it; use "
                        "--transform=center-crop")
    if not os.path.exists(source) and os.fspath(source) != DIGITS:
        raise UserError(f"Missing input file or directory: {source}")


class _Checks:
    """Compares every image with the first, and collects what the user should know at the end."""

    def __init__(self, any_side: bool) -> None:
        self.any_side, self.first, self.small, self.damaged = any_side, (0, 0, 0), 0, 0

    def accept(self, name: str, image: _Prepared) -> None:
        width, height, channels = image.shape
        if self.first == (0, 0, 0):
            self.first = image.shape
            if width != height:
                raise UserError("Image dimensions after scale and crop are required to be square.  "
                                f"Got {width}x{height}; pass --resolution=WxH and --transform=center-crop")
            if channels not in (1, 3):
                raise UserError("Input images must be stored as RGB or grayscale, without transparency; "
                                f"{name} has {channels} channels")
            if width % 4 if self.any_side else width & (width - 1):
                raise UserError("Image width/height after scale and crop are required to be power-of-two. "
                                f"Got {width}x{height}; pass --resolution={1 << (width - 1).bit_length() - 1}x"
                                f"{1 << (width - 1).bit_length() - 1}")
        elif image.shape != self.first:
            pairs = zip(("width", "height", "channels"), self.first, image.shape, strict=True)
            raise UserError(f"Image {name} attributes must be equal across all images of the dataset.  Got: "
                            + " ".join(f"dataset {what}/cur image {what}: {a}/{b}" for what, a, b in pairs)
                            + "; pass --resolution=WxH")

    def left_out(self, image: _Prepared) -> None:
        if image.problem:
            self.damaged += 1
            warnings.warn(image.problem, stacklevel=2)
        else:
            self.small += 1

    def finish(self, source: Path, labels: list[tuple[str, Label]]) -> None:
        if self.small or self.damaged:
            warnings.warn(f"{source}: left out {self.small} images smaller than the resolution and {self.damaged} "
                          "damaged ones", stacklevel=2)
        missing = [name for name, label in labels if label is None]
        if len(missing) == len(labels):
            warnings.warn(f"{source}: no labels, so --cond=1 cannot train on the result", stacklevel=2)
        elif missing:
            warnings.warn(f"{source}: {len(missing)} of {len(labels)} images have no label, so all labels are dropped "
                          "and --cond=1 cannot train on the result", stacklevel=2)


def _first(chunks: Iterator[_Chunk], max_images: int | None) -> Iterator[_Chunk]:
    """Cut the stream after `max_images` source images."""
    for chunk in chunks:
        left = len(chunk.labels) if max_images is None else min(max_images - chunk.start, len(chunk.labels))
        yield chunk._replace(labels=chunk.labels[:left], members=chunk.members[:left], contents=chunk.contents[:left],
                             pixels=None if chunk.pixels is None else chunk.pixels[:left])
        if max_images is not None and chunk.start + left >= max_images:
            return


def _prepare(chunk: _Chunk) -> list[_Prepared]:
    if chunk.stays:
        channels, height, width = chunk.pixels.shape[1:]
        return [_Prepared(index, label, png, (width, height, channels))
                for index, (label, png) in enumerate(zip(chunk.labels, encode_pngs(chunk.pixels), strict=True),
                                                     chunk.start)]
    prepared = []
    for index, (label, image) in enumerate(zip(chunk.labels, chunk.images(), strict=True), chunk.start):
        if isinstance(image, UserError):
            prepared.append(_Prepared(index, label, problem=str(image)))
            continue
        image = transformed(image, *chunk.target)
        if image is None:
            prepared.append(_Prepared(index, label))
        else:
            pixels = np.asarray(image).reshape(1, image.height, image.width, -1).transpose(0, 3, 1, 2)
            prepared.append(_Prepared(index, label, encode_pngs(pixels)[0], (*image.size, pixels.shape[1])))
    return prepared


def transformed(image: Image.Image, transform: str | None, size: tuple[int, int] | None) -> Image.Image | None:
    """Return the image cropped and scaled (see `convert`), or None if it is too small for center-crop-wide."""
    if transform is None:
        return image if size is None or image.size == size else image.resize(size, Image.Resampling.LANCZOS)
    if image.mode == "L":
        image = image.convert("RGB")
    if transform == "center-crop":
        side = min(image.size)
        return _middle(image, side, side).resize(size, Image.Resampling.LANCZOS)
    width, height = size
    wide = round(width * image.height / image.width)
    if image.width < width or wide < height:
        return None
    strip = _middle(image, image.width, min(wide, image.height)).resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new(image.mode, (width, width))
    canvas.paste(strip, (0, (width - height) // 2))
    return canvas


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _open_source(source: Path, test_split: bool) -> tuple[int, Iterator[_Chunk]]:
    """Return (number of images, the stream of them)."""
    if str(source) == DIGITS and not source.exists():
        digits = load_dataset(DIGITS, "test" if test_split else "train")
        return len(digits), _pixels(source, iterate(digits))
    if source.is_dir():
        return _lmdb(source) if source.name.endswith("_lmdb") else _files(source)
    if source.name in CIFAR:
        return CIFAR_TEST if test_split else CIFAR_TRAIN, _cifar(source, CIFAR[source.name], test_split)
    if source.name in (MNIST_TRAIN, MNIST_TEST):
        labels = source.with_name(source.name.replace("-images-idx3-", "-labels-idx1-"))
        if not labels.exists():
            raise UserError(f"Missing input file or directory: {labels}")
        images, numbers = read_mnist(source, labels)
        return len(images), _pixels(source, ((images, numbers),))
    if source.suffix.lower() == ".zip":
        return _files(source)
    if source.suffix.lower() == ".npz":
        images = read_images(source)
        return len(images), _pixels(source, iterate(images))
    raise UserError(f"{source}: Unknown archive type; expected a folder, a .zip, an .npz, {', '.join(CIFAR)}, "
                    f"{MNIST_TRAIN} or {MNIST_TEST}")


def _files(source: Path) -> tuple[int, Iterator[_Chunk]]:
    files = find_images(source)
    if not files.members:
        raise UserError(f"{source}: No image files found in the specified path")
    labels = listed_labels(files)
    if source.is_dir():  # in order of the folder names, where a ZIP keeps that of the whole names
        order = sorted(range(len(files.members)), key=lambda i: files.members[i].name.split("/"))
        members = tuple(files.members[i] for i in order)
        labels = [labels[i] for i in order] if labels is not None else _folder_labels(source, members)
    else:
        members = files.members
    labels = labels or [None] * len(members)
    return len(members), (_Chunk(i, labels[i:i + CHUNK], source, members=members[i:i + CHUNK])
                          for i in range(0, len(members), CHUNK))


def _folder_labels(source: Path, members: tuple[Member, ...]) -> list[Label] | None:
    """Return the number of each image's top-level folder, if there are at least two; files at the top count as ''."""
    tops = [member.name.rpartition("/")[0].partition("/")[0] for member in members]
    folders = sorted(set(tops))
    if len(folders) < 2:
        return None
    values = class_values(source, folders)
    return [values[top] for top in tops]


def _pixels(source: Path, parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[_Chunk]:
    start = 0
    for images, numbers in parts:
        for i in range(0, len(images), CHUNK):
            labels = [None if number < 0 else number for number in numbers[i:i + CHUNK].tolist()]
            yield _Chunk(start + i, labels, source, pixels=np.array(images[i:i + CHUNK]))
        start += len(images)


def _cifar(source: Path, layout: Layout, test_split: bool) -> Iterator[_Chunk]:
    names, expected = (layout.test, CIFAR_TEST) if test_split else (layout.train, CIFAR_TRAIN)
    seen, count = set(), 0
    for chunk in _pixels(source, one_ahead(read_batches(source, layout, names))):
        seen.update(chunk.labels)
        count += len(chunk.labels)
        yield chunk
    if count != expected:
        warnings.warn(f"{source}: {count} images in place of {expected}", stacklevel=2)
    if absent := sorted(set(range(layout.num_classes)) - seen):
        warnings.warn(f"{source}: no image of class {', '.join(map(str, absent))}; without the top class a network's "
                      "label input is narrower", stacklevel=2)


def _lmdb(source: Path) -> tuple[int, Iterator[_Chunk]]:
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{source}: reading LMDB needs the package lmdb: pip install lmdb") from None
    try:
        environment = lmdb.open(str(source), readonly=True, lock=False)
    except lmdb.Error as error:
        raise UserError(f"{source}: not a readable LMDB ({error})") from None

    def chunks() -> Iterator[_Chunk]:
        with environment.begin(buffers=False) as transaction:
            values, start = [], 0
            for _, value in transaction.cursor():
                values.append(value)
                if len(values) == CHUNK:
                    yield _Chunk(start, [None] * CHUNK, source, contents=tuple(values))
                    values, start = [], start + CHUNK
            if values:
                yield _Chunk(start, [None] * len(values), source, contents=tuple(values))

    return environment.stat()["entries"], chunks()
