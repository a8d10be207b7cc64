"""ImageSet: the images every reader returns, every trainer takes and every writer writes; and how one is decoded.

One policy for every image: the EXIF orientation is applied; transparency lies on white; palettes become colours,
bilevel becomes gray; gray of 16 bits is scaled to 8; CMYK, YCbCr and LAB become RGB; an animation is its first frame.
Images of more than MAX_PIXELS are refused, and images of more than PLAIN_PIXELS that are packed as only plain colour
can be; FEWLABEL_MAX_PIXELS raises both limits.
"""
from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.cli import UserError
from shared.data.cache import Allocate, Stored, cached
from shared.data.classes import (
    ImageFiles,
    find_images,
    find_table,
    has_names,
    in_order,
    listed_labels,
    match_labels,
)
from shared.data.formats import read_npz
from shared.data.listing import is_hidden, walk
from shared.data.safe import Member, read_members
from shared.parallel import ordered_map
from shared.training.fingerprint import fingerprint, fingerprint_arrays
from shared.training.progress import Progress

CHUNK = 256  # images a worker decodes at a time
MAX_PIXELS = 1 << 27     # 134 million: 400 MB in colour
PLAIN_PIXELS = 1 << 24   # an image of fewer pixels may be of one colour, packed as well as that can be
# Decoded to stored bytes of plain colour: a blank JPEG reaches 250, a PNG of one colour 200 to 1000, a scan 100.
PLAIN_RATIO, LOSSY_RATIO = 150, 500
LOSSY = ("JPEG", "JPEG2000", "WEBP", "AVIF")
EXIF_ORIENTATION = 0x0112
PIXELS_VARIABLE = "FEWLABEL_MAX_PIXELS"
Image.MAX_IMAGE_PIXELS = None  # the limit is ours


class UnequalSizes(UserError):
    """Images of several sizes where one is needed."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their classes.

    images: uint8 [N, C, H, W], C = 1 (gray) or 3 (RGB); may be memory-mapped.
    labels: int64 [N]; -1 where the class is unknown.
    classes: names of the classes, in label order; () if no image has a label.
    name: of the set in messages.
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
            raise UnequalSizes(f"{other.name} has images of {shape_text(other)}, {self.name} of {shape_text(self)}")
        if self.classes and other.classes and self.classes != other.classes:
            raise UserError(f"{other.name} has other classes than {self.name}")
        return ImageSet(np.concatenate((self.images, other.images)), np.concatenate((self.labels, other.labels)),
                        self.classes or other.classes, self.name)


def shape_text(images: ImageSet) -> str:
    """Return e.g. '3 x 32 x 32' (channels, height, width)."""
    return f"{images.channels} x {images.size[0]} x {images.size[1]}"


def iterate(images: ImageSet, chunk: int = CHUNK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (images, labels) in chunks; a memory-mapped set is never copied whole."""
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


def with_names(images: ImageSet, classes: Sequence[str], source: str | Path) -> ImageSet:
    """Return the set with the labels that its classes have in `classes`, by name (see match_labels).

    A warning says which classes it has no image of. Labels of classes without names stay, and so do the names of a set
    whose numbers lie beyond `classes`. Raises UserError for a class that is none of `classes`.
    """
    labels = match_labels(images.labels, images.classes, classes, source)
    if has_names(images.classes) and (absent := sorted(set(range(len(classes))) - set(labels.tolist()))):
        more = ", ..." if len(absent) > 10 else ""
        warnings.warn(f"{source}: no image of class {', '.join(classes[c] for c in absent[:10])}{more}", stacklevel=2)
    is_beyond = int(labels.max(initial=-1)) >= len(classes)  # of numbers, for which there is nothing to match
    return replace(images, labels=labels, classes=images.classes if is_beyond else tuple(classes))


def channel_statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, standard deviation) of each channel on the unit scale; the latter is at least a gray level."""
    counts = np.zeros((images.channels, 256))
    for pixels, _ in iterate(images, 4096):
        counts += [np.bincount(pixels[:, channel].ravel(), minlength=256) for channel in range(images.channels)]
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(np.maximum(counts @ levels ** 2 / counts.sum(1) - mean ** 2, 0))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


# ----------------------------------------------------------------------------------------------------------- one image

def open_image(data: bytes, name: str) -> Image.Image:
    """Decode one image file by the policy of this module, to mode L or RGB.

    Raises UserError, naming it, if it is damaged, hostile or not 8 or 16 bits a channel.
    """
    return plain_image(load_image(data, name), name)


def plain_image(image: Image.Image, name: str) -> Image.Image:
    """Return a decoded image as `open_image` does; UserError, naming it, for other numbers than 8 or 16 bits."""
    try:
        return _plain(_upright(image))
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise UserError(f"{name}: cut short or not an image ({error})") from None
    except NotImplementedError:
        raise UserError(f"{name}: mode {image.mode} is neither 8 nor 16 bits a channel; convert it to 8-bit gray or "
                        "RGB") from None


def load_image(data: bytes, name: str) -> Image.Image:
    """Decode one image file as it is, in any mode of Pillow; UserError, naming it, if it is damaged or hostile."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.format == "EPS":
            raise UserError(f"{name}: PostScript is not read")
        _check_size(image, len(data), name)
        image.load()
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error, Image.DecompressionBombError,
            OverflowError) as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: cut short or not an image ({reason})") from None
    return image


def _check_size(image: Image.Image, stored: int, name: str) -> None:
    """Raise UserError for an image of too many pixels, or of many in next to no bytes."""
    given = os.environ.get(PIXELS_VARIABLE, "")
    most, pixels = max(MAX_PIXELS, int(given) if given.isdigit() else 0), image.width * image.height
    size = pixels * len(image.getbands()) / (8 if image.mode == "1" else 1)
    is_plain = pixels > PLAIN_PIXELS and size > (LOSSY_RATIO if image.format in LOSSY else PLAIN_RATIO) * stored
    if pixels > most or is_plain and not given:
        raise UserError(f"{name}: refused, {stored} bytes unfold to {image.width}x{image.height} pixels; if it is an "
                        f"image, allow it with {PIXELS_VARIABLE}={max(pixels, MAX_PIXELS)} before the command")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, struct.error):
        return image  # a damaged note on a whole image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _plain(image: Image.Image) -> Image.Image:
    """Return a decoded image as L or RGB; NotImplementedError for other numbers than 8 or 16 bits."""
    if image.mode in ("P", "PA") or "transparency" in image.info and image.mode in ("1", "L", "RGB"):
        is_gray = image.mode in ("1", "L")
        image = image.convert("RGBA").convert("LA") if is_gray else image.convert("RGBA")
        if image.mode == "RGBA" and image.getextrema()[3] == (255, 255):
            return image.convert("RGB")
    if image.mode in ("RGBA", "LA", "RGBa", "La"):
        mode = "RGBA" if image.mode.startswith("RGB") else "LA"
        image = image if image.mode == mode else image.convert(mode)
        white = Image.new(mode.removesuffix("A"), image.size, 255 if mode == "LA" else (255, 255, 255))
        white.paste(image.convert(white.mode), mask=image.getchannel("A"))
        return white
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        return image.convert("RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if 0 <= values.min() and values.max() <= 65_535:
            return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))
    raise NotImplementedError


def to_chw(image: Image.Image, channels: int | None = None) -> np.ndarray:
    """Return uint8 [C, H, W] with 1 or 3 channels (default: as many as the image has)."""
    if channels is None:
        channels = 1 if image.mode == "L" else 3
    mode = "L" if channels == 1 else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------------------- readers

def read_images(path: str | Path, *, resolution: int | None = None, channels: int | None = None,
                num_classes: int | None = None, classes: Sequence[str] | None = None, part: str = "",
                table: str | Path | None = None) -> ImageSet:
    """Read a folder, a ZIP or an npz of images: decoded once on all cores, later opened from the cache.

    - a folder or ZIP with a dataset.json `{"labels": [["file", class], ...]}`, if wanted with `"classes": [names]`, or
      with a CSV of the columns file and label (labels.csv in it or beside it, or `table`): files by name. An image that
      is not listed, or listed without a label, has the label -1, and a warning says how many;
    - a folder or ZIP with class sub-folders (shared/data/classes.py): the files in each, by class, folder, file name;
    - a folder or ZIP of images without either: labels -1;
    - an npz (shared/data/formats.py); `part` "train/" or "test/" selects the arrays of that split.

    `resolution`: the images must be squares of this side. `channels`: 1 or 3; default 1 if every image is gray, else 3.
    `num_classes`: labels must lie below it. `classes`: names that another set has in label order, matched by name.
    `part`: only the names in a ZIP that begin so.

    Raises UserError for a missing path, no images, unequal sizes, damaged or hostile files and wrong labels.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    is_array = path.suffix.lower() == ".npz" and path.is_file()
    table = None if table is None else Path(table)
    labels = None if is_array else table or find_table(path)
    hidden = sorted(filter(is_hidden, walk(path))) if path.is_dir() else []  # which the fingerprint passes over
    labels_key = None if labels is None else [table is not None, fingerprint(labels)]
    options = [channels, part, labels_key, len(hidden), *hidden[:1]]
    key, name = [fingerprint(path), options], path.stem if path.is_file() else path.resolve().name

    def read(allocate: Allocate) -> Stored:
        if is_array:
            return read_npz(path, part.rstrip("/"), allocate)
        return _read_files(find_images(path, part, table), channels, part, allocate)

    stored = cached(name, key, read, path)
    images = ImageSet(stored.images, stored.labels, stored.classes, name, stored.vectors)
    if classes is not None:
        images = with_names(images, classes, path)
    if resolution is not None and images.size != (resolution, resolution):
        raise UserError(f"{path}: Image files do not match the specified resolution: they are "
                        f"{images.size[1]}x{images.size[0]}, not {resolution}x{resolution}")
    return images if num_classes is None else with_classes(images, num_classes, path)


def _read_files(files: ImageFiles, channels: int | None, part: str, allocate: Allocate) -> Stored:
    kept, found = in_order(files, part)
    listed, notes = listed_labels(files), [*files.notes]
    images = decode(kept, channels, allocate)
    if found is None:
        vectors = None if listed is None else np.array(listed, np.float32)
        return Stored(images, np.full(len(files), -1, np.int64), vectors=vectors, notes=files.notes)
    if listed is not None and (missing := [name for name, label in zip(files.names, listed, strict=True)
                                           if label is None]):
        notes.append(f"{len(missing)} of {len(files)} images have no label in {files.label_file} (first: "
                     f"{missing[0]}); they count as unlabelled")
    if loose := len(files) - len(kept):
        notes.append(f"{loose} images that lie in no class folder are left out")
    empty = sorted(set(range(len(found.names))) - set(found.labels.tolist()))
    if listed is None and empty:
        notes.append(f"no image of class {', '.join(found.names[c] for c in empty[:10])}")
    return Stored(images, found.labels, found.names, notes=tuple(notes))


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
            raise UnequalSizes(f"{path}/{member.name} is {image.width}x{image.height}, the images before it "
                               f"{size[1]}x{size[0]}; make them equal with dataset_tool.py --resolution")
        images.append(to_chw(image, channels))
    most = max(map(len, images))
    return np.stack([np.broadcast_to(image, (most, *size)) for image in images])
