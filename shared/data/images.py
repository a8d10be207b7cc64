"""ImageSet: the images every reader returns, every trainer takes and every writer writes."""
from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from shared.cli import UserError
from shared.data.cache import Allocate, Stored, cached
from shared.data.classes import LABEL_FILE, MAX_CLASSES, ImageFiles, classes_by_folder, find_images, listed_labels
from shared.data.parallel import ordered_map
from shared.data.safe import MAX_RATIO, READ_ERRORS, Member, read_members, zip_members
from shared.training.fingerprint import fingerprint, fingerprint_arrays
from shared.training.progress import Progress

CHUNK = 256  # images a worker decodes at a time
MAX_ARRAY_BYTES = 1 << 40
MAX_PIXELS = 89_478_485  # Pillow's own bound, at which it only warns
PLAIN_PIXELS = 1 << 24   # an image of fewer pixels may be of one colour, packed as well as that can be


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their classes.

    images: uint8 [N, C, H, W], C = 1 (gray) or 3 (RGB); may be memory-mapped.
    labels: int64 [N]; -1 where the class is unknown.
    classes: names of the classes, in label order; () if no image has a label.
    name: what messages call the set.
    vectors: float32 [N, D] where dataset.json labels images by lists of numbers in place of classes.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    vectors: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or len(self.images) != len(self.labels):
            raise ValueError(f"expected uint8 [N, C, H, W] and N labels, got {self.images.dtype} {self.images.shape} "
                             f"and {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def has_labels(self) -> bool:
        """Whether the class of at least one image is known."""
        return bool((self.labels >= 0).any())

    @property
    def fingerprint(self) -> str:
        """Digest of images, labels and class names; that of memory-mapped images is computed once and remembered."""
        return fingerprint_arrays(self.images, self.labels, self.vectors, self.classes)

    def subset(self, indices: np.ndarray | Sequence[int] | slice) -> ImageSet:
        """Return the images at `indices`, in that order."""
        vectors = None if self.vectors is None else self.vectors[indices]
        return ImageSet(self.images[indices], self.labels[indices], self.classes, self.name, vectors)

    def concatenate(self, other: ImageSet) -> ImageSet:
        """Return this set followed by `other`; raise UserError if image shapes or classes differ."""
        if self.images.shape[1:] != other.images.shape[1:]:
            raise UserError(f"{other.name} has images of {shape_text(other)}, {self.name} of {shape_text(self)}")
        if self.classes and other.classes and self.classes != other.classes:
            raise UserError(f"{other.name} has other classes than {self.name}")
        return ImageSet(np.concatenate((self.images, other.images)), np.concatenate((self.labels, other.labels)),
                        self.classes or other.classes, self.name)


def shape_text(images: ImageSet) -> str:
    """Return e.g. '3 x 32 x 32' (channels, height, width)."""
    return f"{images.channels} x {images.size[0]} x {images.size[1]}"


def iterate(images: ImageSet, chunk: int = CHUNK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (images, labels) a chunk at a time, so that a memory-mapped set is never copied whole."""
    for start in range(0, len(images), chunk):
        yield images.images[start:start + chunk], images.labels[start:start + chunk]


def with_classes(images: ImageSet, num_classes: int, source: str | Path) -> ImageSet:
    """Return the set with exactly `num_classes` classes; raise UserError if a label lies beyond them."""
    top = int(images.labels.max(initial=-1))
    if top >= num_classes:
        raise UserError(f"{source}: has class {images.classes[top]!r}, number {top}, but there are only {num_classes} "
                        "classes (num_classes)")
    names = images.classes[:num_classes] + tuple(str(c) for c in range(len(images.classes), num_classes))
    return ImageSet(images.images, images.labels, names, images.name, images.vectors)


# ----------------------------------------------------------------------------------------------------------- one image

def open_image(data: bytes, name: str) -> Image.Image:
    """Decode one image file; raise UserError, naming it, if it is damaged, hostile or not 8 bits a channel.

    The result has mode L, RGB, LA or RGBA: palettes become the colours they mean, bilevel becomes L.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.format == "EPS":
            raise UserError(f"{name}: PostScript is not read")
        pixels = image.width * image.height
        if pixels > MAX_PIXELS or pixels > PLAIN_PIXELS and pixels * len(image.getbands()) > MAX_RATIO * len(data):
            raise UserError(f"{name}: refused, {len(data)} bytes unfold to {image.width}x{image.height} pixels")
        image.load()
        if image.mode in ("L", "RGB", "LA", "RGBA"):
            return image
        if image.mode == "1":
            return image.convert("L")
        if image.mode == "P":
            return image.convert("RGBA").convert("RGB")
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error, Image.DecompressionBombError,
            OverflowError) as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: cut short or not an image ({reason})") from None
    raise UserError(f"{name}: mode {image.mode} is not 8 bits a channel; convert it to 8-bit gray or RGB")


def to_chw(image: Image.Image, channels: int | None = None) -> np.ndarray:
    """Return uint8 [C, H, W] with 1 or 3 channels (default: as many as the image has), transparency dropped."""
    if channels is None:
        channels = 1 if image.mode in ("L", "LA") else 3
    mode = "L" if channels == 1 else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------------------- readers

def read_images(path: str | Path, *, resolution: int | None = None, channels: int | None = None,
                num_classes: int | None = None, classes: Sequence[str] | None = None, part: str = "") -> ImageSet:
    """Read a folder, a ZIP or an npz of images: decoded once on all cores, later opened from the cache.

    - a folder or ZIP with a dataset.json `{"labels": [["file", class], ...]}`: files by name. An image that is not
      listed, or listed with null, has the label -1, and a warning says how many;
    - a folder or ZIP with class sub-folders (shared/data/classes.py): the files in each, by class, folder, file name;
    - a folder or ZIP of images without either: labels -1;
    - an npz with `images` uint8 [N, C, H, W] or [N, H, W, C], and if known `labels` int64 [N] and `classes`.

    `resolution`: the images must be squares of this side. `channels`: 1 or 3; default 1 if every image is gray, else 3.
    `num_classes`: labels must lie below it. `classes`: the names in label order, if another set fixes them.
    `part`: only the names in a ZIP that begin so.

    Raises UserError for a missing path, no images, unequal sizes, damaged or hostile files and wrong labels.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    options = [channels, list(classes) if classes is not None else None, part]
    key, name = [fingerprint(path), options], path.stem if path.is_file() else path.resolve().name

    def read(allocate: Allocate) -> Stored:
        if path.suffix.lower() == ".npz" and path.is_file():
            return _read_npz(path, allocate)
        return _read_files(find_images(path, part), channels, classes, part, allocate)

    stored = cached(name, key, read, path)
    images = ImageSet(stored.images, stored.labels, stored.classes, name, stored.vectors)
    if resolution is not None and images.size != (resolution, resolution):
        raise UserError(f"{path}: Image files do not match the specified resolution: they are "
                        f"{images.size[1]}x{images.size[0]}, not {resolution}x{resolution}")
    return images if num_classes is None else with_classes(images, num_classes, path)


def _read_files(files: ImageFiles, channels: int | None, classes: Sequence[str] | None, part: str,
                allocate: Allocate) -> Stored:
    labels = listed_labels(files)
    if labels is None:
        return _read_by_folder(files, channels, classes, part, allocate)
    images = decode(files, channels, allocate)
    unknown = np.full(len(files), -1, np.int64)
    if isinstance(labels[0], list):
        return Stored(images, unknown, vectors=np.array(labels, np.float32))
    numbers = np.array([-1 if label is None else label for label in labels], np.int64)
    notes = ()
    if missing := [name for name, label in zip(files.names, labels, strict=True) if label is None]:
        notes = (f"{len(missing)} of {len(files)} images have no label in {LABEL_FILE} (first: "
                 f"{missing[0]}); they count as unlabelled",)
    return Stored(images, numbers, tuple(str(c) for c in range(numbers.max() + 1)), notes=notes)


def _read_by_folder(files: ImageFiles, channels: int | None, classes: Sequence[str] | None, part: str,
                    allocate: Allocate) -> Stored:
    names = [name.removeprefix(part) for name in files.names]
    found = classes_by_folder(names, files.path, classes)
    if found is None:
        return Stored(decode(files, channels, allocate), np.full(len(files), -1, np.int64))
    # Class folder by class folder, inside it by sub-folder, then by file name.
    tops = found.labels.tolist() if classes is None else [name.partition("/")[0] for name in names]
    order = sorted(np.flatnonzero(found.labels >= 0).tolist(), key=lambda i: (tops[i], *names[i].rpartition("/")[::2]))
    labels, notes = found.labels[order], []
    if loose := len(files) - len(order):
        notes.append(f"{loose} images that lie in no class folder are left out")
    if empty := sorted(set(range(len(found.names))) - set(labels.tolist())):
        notes.append(f"no image of class {', '.join(found.names[c] for c in empty[:10])}")
    kept = ImageFiles(files.path, tuple(files.members[i] for i in order), {})
    return Stored(decode(kept, channels, allocate), labels, found.names, notes=tuple(notes))


def decode(files: ImageFiles, channels: int | None, allocate: Allocate) -> np.ndarray:
    """Decode all files into one uint8 array [N, C, H, W] on all cores.

    `channels` None: 1 if every image is gray, else 3. Raises UserError if there are none or their sizes differ.
    """
    if not files.members:
        raise UserError(f"{files.path}: No image files found in the specified path; expected images, or sub-folders of "
                        "images named by class")
    first = to_chw(open_image(next(files.read()), f"{files.path}/{files.names[0]}"), channels)
    array = allocate((len(files), *first.shape))
    chunks = ((files.path, files.members[i:i + CHUNK], channels, first.shape[1:]) for i in range(0, len(files), CHUNK))
    progress = Progress(f"decoding {files.path.name}", len(files), "images")
    with closing(progress), closing(ordered_map(_decode_chunk, chunks)) as results:
        for images in results:
            if images.shape[1] > array.shape[1]:  # gray up to here
                break
            array[progress.count:progress.count + len(images)] = images
            progress.advance(len(images))
        else:
            return array
    return decode(files, 3, allocate)


def _decode_chunk(chunk: tuple[Path, tuple[Member, ...], int | None, tuple[int, int]]) -> np.ndarray:
    """Return uint8 [n, C, H, W]."""
    path, members, channels, size = chunk
    images = []
    for member, data in zip(members, read_members(path, members), strict=True):
        image = open_image(data, f"{path}/{member.name}")
        if image.size != size[::-1]:
            raise UserError(f"{path}/{member.name} is {image.width}x{image.height}, the images before it "
                            f"{size[1]}x{size[0]}; make them equal with dataset_tool.py --resolution")
        images.append(to_chw(image, channels))
    most = max(map(len, images))
    return np.stack([np.broadcast_to(image, (most, *size)) for image in images])


def _read_npz(path: Path, allocate: Allocate) -> Stored:
    names = [member.name for member in zip_members(path, max_member=MAX_ARRAY_BYTES)]
    if "images.npy" not in names:
        raise UserError(f"{path}: expected an array `images`, uint8 [N, C, H, W]; it holds "
                        f"{', '.join(names) or 'nothing'}")
    try:
        with np.load(path, allow_pickle=False) as arrays, arrays.zip.open("images.npy") as stream:
            images = _stream_images(path, stream, arrays.zip.getinfo("images.npy").file_size, allocate)
            labels = arrays["labels"] if "labels" in arrays else np.full(len(images), -1)
            classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    except (*READ_ERRORS, MemoryError, TypeError) as error:
        raise UserError(f"{path}: cut short or not plain arrays ({error})") from None
    known = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not known or not -1 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise UserError(f"{path}: `labels` must be {len(images)} integers from -1 on, got {labels.dtype} "
                        f"{list(labels.shape)}")
    count = int(labels.max()) + 1
    if classes is not None and len(classes) < count:
        raise UserError(f"{path}: {len(classes)} `classes` but a label {count - 1}")
    return Stored(images, labels.astype(np.int64), tuple(classes or map(str, range(count))))


def _stream_images(path: Path, stream: IO[bytes], size: int, allocate: Allocate) -> np.ndarray:
    """Copy the array of an .npy stream of `size` bytes a chunk at a time."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read_header[np.lib.format.read_magic(stream)](stream)
    if len(shape) != 4 or dtype != np.uint8 or fortran or not shape[0] or not {1, 3} & {shape[1], shape[3]}:
        raise UserError(f"{path}: `images` must be uint8 [N, 1 or 3, H, W] in C order, got {dtype} {list(shape)}")
    if math.prod(shape) > size:
        raise UserError(f"{path}: cut short, `images` should be {list(shape)}")
    last = shape[1] not in (1, 3)  # channels last
    array = allocate((shape[0], shape[3], *shape[1:3]) if last else shape)
    for start in range(0, len(array), CHUNK):
        count = min(CHUNK, len(array) - start)
        data = stream.read(count * math.prod(shape[1:]))
        chunk = np.frombuffer(data, np.uint8).reshape(count, *shape[1:])
        array[start:start + count] = chunk.transpose(0, 3, 1, 2) if last else chunk
    return array
