"""Convert images to the ZIP or folder of uncompressed PNGs for EDM, optionally with label noise.

Labels come from a dataset.json in the source, {"labels": [["folder/image.png", 6], ...]}, or else from the top-level
folders, if there are at least two: in order of name, or by value if all are numbers.

python dataset_tool.py --source=downloads/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
python dataset_tool.py --source=downloads/images --dest=datasets/images-64x64.zip \\
    --resolution=64x64 --transform=center-crop

Label noise is for experiments with wrong labels. dataset.json then also holds the clean labels, the flips, the
transition matrix and the realised one.

python dataset_tool.py --source=downloads/cifar-10-python.tar.gz \\
    --dest=datasets/cifar10_sym_40-32x32.zip --noise_type=sym --noise_rate=0.4
"""
from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from EDM.conversion.sources import (
    CIFAR,
    DIGITS,
    MNIST_TEST,
    MNIST_TRAIN,
    Item,
    Label,
    Part,
    is_digits,
    mnist_labels,
    open_source,
)
from EDM.tdsm.transition import plan_noise
from shared.cli import Bool, Choice, Flag, Float, Int, Option, Text, UserError, parse, run_main
from shared.data.classes import find_table
from shared.data.datasets import load_dataset
from shared.data.images import PIXELS_VARIABLE, load_image, plain_image
from shared.data.safe import Member, read_members
from shared.data.writers import encode_png, image_name, labels_json, open_destination, to_pillow
from shared.parallel import ordered_map
from shared.training.files import make_dir
from shared.training.progress import Progress
from shared.training.record import Record

CHUNK = 128  # images a worker prepares at a time
MAX_SIDE = 16_384


class Resolution:
    """A size in pixels, WxH or W,H -> (width, height)."""

    metavar, range = "WxH", ""

    def convert(self, text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)[x,](\d+)", text)
        if match is None or not all(1 <= int(side) <= MAX_SIDE for side in match.groups()):
            raise ValueError(f"{text!r} is not WxH or W,H, such as 32x32.")
        return int(match[1]), int(match[2])


FLAGS = {
    "": (
        Option("--source", Text, required=True, metavar="PATH",
               help="folder, folder ending in _lmdb, .zip, .npz, cifar-10-python.tar.gz, cifar-100-python.tar.gz or "
                    "train-images-idx3-ubyte.gz (t10k-images-idx3-ubyte.gz); or digits, scikit-learn's"),
        Option("--dest", Text, required=True, help="the .zip file to write, or an empty folder", metavar="PATH"),
        Option("--max-images", Int(1), None, "take the first images only"),
        Option("--transform", Choice("center-crop", "center-crop-wide"), None, "crop before scaling; needs "
               "--resolution"),
        Option("--resolution", Resolution, None, "size of the written images, such as 64x64"),
        Option("--eval", Bool, False, "take the test images of a CIFAR archive or of digits"),
        Option("--overwrite", Flag, False, "replace a .zip made from another source"),
        Option("--labels", Text, None, "CSV of the columns file and label", metavar="CSV",
               default_help="labels.csv in the source or beside it"),
        Option("--test-fraction", Float(0, 1, open=True), None, "divide the source by class: write DEST/train.zip and "
               "DEST/test.zip, which gets this fraction"),
        Option("--max-pixels", Int(1), None, "largest image that is read, in pixels", default_help="134 million"),
    ),
    "label noise": (
        Option("--noise_type", Choice("sym", "asym"), None, "flip labels: to any other class, or to one similar class"),
        Option("--noise_rate", Float(0, 1, open="high"), None, "probability of a flip"),
        Option("--transition", Text, None, "flip labels by this matrix instead: .json or .npy, row = clean class",
               metavar="FILE"),
        Option("--dataset", Text, None, "mnist, cifar10, cifar100 or digits, for --noise_type", metavar="NAME",
               default_help="by the name of the source or --dest"),
        Option("--seed", Int(0, 2**32 - 1), None, "seed of the flips and of --test-fraction", default_help="0"),
    ),
}
Labels = list[tuple[str, Label]]
# --transform -> the resize in dataset.json, which predict.py repeats.
RESIZES = {None: "square", "center-crop": "centre"}
# The labels of the written images, in their order -> the labels to write, and further keys of dataset.json.
Relabel = Callable[[Labels], tuple[Labels, dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    o = parse(__doc__, FLAGS, argv)
    if o.max_pixels is not None:
        os.environ[PIXELS_VARIABLE] = str(o.max_pixels)  # also for the processes that decode
    divided = o.test_fraction is not None
    if divided and o.dest.lower().endswith((".zip", ".npz")):
        raise UserError(f"--test-fraction writes two sets, train.zip and test.zip: name a folder in place of "
                        f"--dest={o.dest}")
    has_noise = o.noise_type is not None or o.transition is not None
    seed_of_noise = None if divided and not has_noise else o.seed
    relabel = plan_noise(o.noise_type, o.noise_rate, o.transition, o.dataset, seed_of_noise, o.source, o.dest)
    inputs = {"--source": o.source, "--transition": o.transition, "--labels": o.labels or find_table(Path(o.source))}
    if is_digits(o.source):
        inputs["--source"] = load_dataset(DIGITS, "test" if o.eval else "train")
    if Path(o.source).name in (MNIST_TRAIN, MNIST_TEST):
        inputs["the labels beside --source"] = mnist_labels(Path(o.source))
    names = ("max_images", "transform", "resolution", "eval", "noise_type", "noise_rate", "dataset", "seed")
    settings = {name: getattr(o, name) for name in names}
    if divided:
        settings["test_fraction"] = o.test_fraction

    def make(dest: str | Path, part: Part | None = None, noise: Relabel | None = None) -> None:
        record = Record(dest, settings, inputs)
        into_zip = str(dest).lower().endswith(".zip")  # a folder has to be empty, as published
        if into_zip and record.is_complete(overwrite=o.overwrite):
            return
        convert(o.source, dest, o.max_images, o.transform, o.resolution, test_split=o.eval, relabel=noise,
                table=o.labels, part=part)
        if into_zip:
            record.write()

    if not divided:
        return make(o.dest, noise=relabel)
    for name, noise in (("train", relabel), ("test", None)):  # tests are on clean labels
        make(Path(o.dest) / f"{name}.zip", Part(name, o.test_fraction, o.seed or 0), noise)


def convert(source: str | os.PathLike, dest: str | os.PathLike, max_images: int | None = None,
            transform: str | None = None, resolution: tuple[int, int] | None = None, *, test_split: bool = False,
            relabel: Relabel | None = None, table: str | os.PathLike | None = None, part: Part | None = None) -> None:
    """Write the images of `source` to `dest`, a .zip file or a folder that is empty or absent.

    source: as --source; an .npz holds images and labels, the fine labels of CIFAR-100 are taken, and those of MNIST lie
        beside its images. Images are taken in path order, at most `max_images`.
    transform: None resizes to `resolution` (width, height) if given; "center-crop" takes the middle square first;
        "center-crop-wide" takes the middle of that aspect ratio, leaves out images that are too small, and puts the
        result on a black square. The last two make gray images RGB.
    test_split: take the test images of a CIFAR archive or of the digits.
    relabel: function that changes the labels before they are written.
    table: a CSV of labels. part: convert a part of the source alone.

    Images stream through one process per core (pixels that stay as they are: through one), and no more than a few
    hundred are held. The destination appears when it is complete, and not at all after an error. Raises UserError for
    unreadable files, and for results of unequal size, not square, not gray or RGB, or of a side that is no power of
    two (from an .npz: no multiple of 4).
    """
    source, dest = Path(source), Path(dest)
    _check_arguments(source, transform, resolution, test_split)
    images = open_source(source, test_split, None if table is None else Path(table), part)
    work = ((source, index, chunk, transform, resolution) for index, chunk in
            _chunks(islice(images.items, max_images)))
    has_pixels = not source.is_dir() and source.suffix.lower() != ".zip"
    workers = 1 if has_pixels and resolution is None else None  # to send them costs more than to encode them
    make_dir(dest.absolute().parent)
    check, labels = _Checks(any_side=source.suffix == ".npz"), []
    progress = Progress(f"converting {source.name}", min(images.total, max_images or images.total), "images")
    with open_destination(dest) as save:
        with closing(progress):
            for prepared in ordered_map(_prepare, work, workers):
                for image in prepared:
                    progress.advance()
                    if not image.png:
                        check.left_out(image)
                        continue
                    name = image_name(image.index)
                    check.accept(name, image)
                    save(name, image.png)
                    labels.append((name, image.label))
        if not labels:
            raise UserError(f"{source}: no image is left: all are smaller than {resolution} or damaged")
        written, further = relabel(labels) if relabel is not None else (labels, {})
        if resolution is not None and transform in RESIZES:
            further = {**further, "resize": RESIZES[transform]}
        save("dataset.json", labels_json(written, images.classes, further).encode())
    check.finish(source, labels)
    width, height, channels = check.first
    print(f"{dest}: {len(labels)} images, {channels} x {height} x {width}", flush=True)


def _chunks(items: Iterator[Item]) -> Iterator[tuple[int, list[Item]]]:
    """Yield (number of the first image, images) of consecutive parts."""
    index = 0
    while chunk := list(islice(items, CHUNK)):
        yield index, chunk
        index += len(chunk)


def _check_arguments(source: Path, transform: str | None, resolution: tuple[int, int] | None, test_split: bool) -> None:
    if transform is not None and resolution is None:
        raise UserError(f"must specify --resolution=WxH when using {transform} transform")
    if transform == "center-crop-wide" and resolution[1] > resolution[0]:
        raise UserError(f"--resolution={resolution[0]}x{resolution[1]} is not wide, as center-crop-wide needs it; use "
                        "--transform=center-crop")
    if not source.exists() and not is_digits(source):
        raise UserError(f"Missing input file or directory: {source}")
    if test_split and source.name not in (*CIFAR, MNIST_TEST) and not is_digits(source):
        raise UserError(f"--eval takes the test images of {', '.join(CIFAR)} or {DIGITS}; {source} has one part: leave "
                        f"it out (MNIST's test images are the source {MNIST_TEST})")


class _Checks:
    """Compares every image with the first, and collects the messages for the end."""

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
                side = 1 << (width - 1).bit_length() - 1
                raise UserError("Image width/height after scale and crop are required to be power-of-two. "
                                f"Got {width}x{height}; pass --resolution={side}x{side}")
        elif image.shape != self.first:
            found = (*image.shape[:2], image.bands if image.shape[2] != self.first[2] else image.shape[2])
            pairs = zip(("width", "height", "channels"), self.first, found, strict=True)
            raise UserError(f"Image {name} attributes must be equal across all images of the dataset.  Got: "
                            + " ".join(f"dataset {what}/cur image {what}: {a}/{b}" for what, a, b in pairs)
                            + "; pass --resolution=WxH")

    def left_out(self, image: _Prepared) -> None:
        if image.problem:
            self.damaged += 1
            warnings.warn(image.problem, stacklevel=2)
        else:
            self.small += 1

    def finish(self, source: Path, labels: Labels) -> None:
        if self.small or self.damaged:
            warnings.warn(f"{source}: left out {self.small} images smaller than the resolution and {self.damaged} "
                          "damaged ones", stacklevel=2)
        missing = sum(label is None for _, label in labels)
        if missing == len(labels):
            warnings.warn(f"{source}: no labels, so train.py --cond=1 cannot train on the result", stacklevel=2)
        elif missing:
            warnings.warn(f"{source}: {missing} of {len(labels)} images have no label, so all labels are dropped and "
                          "train.py --cond=1 cannot train on the result", stacklevel=2)


# -------------------------------------------------------------------------------------------------------------- images

class _Prepared(NamedTuple):
    index: int                      # of the source image
    label: Label
    png: bytes = b""                # empty: left out
    shape: tuple[int, int, int] = (0, 0, 0)     # width, height, channels
    bands: int = 0                  # channels of the file, transparency among them
    problem: str = ""               # why it was left out, if it could not be decoded


def _prepare(work: tuple[Path, int, list[Item], str | None, tuple[int, int] | None]) -> list[_Prepared]:
    source, first, chunk, transform, size = work
    labels, images = zip(*chunk, strict=True)
    prepared = []
    for index, (label, found) in enumerate(zip(labels, _decoded(source, images, first), strict=True), first):
        if isinstance(found, UserError):
            prepared.append(_Prepared(index, label, problem=str(found)))
            continue
        image, bands = found
        image = transformed(image, transform, size)
        if image is None:
            prepared.append(_Prepared(index, label))
        else:
            prepared.append(_Prepared(index, label, encode_png(image), (*image.size, len(image.getbands())), bands))
    return prepared


def _decoded(source: Path, images: Sequence[Member | bytes | np.ndarray],
             first: int) -> Iterator[tuple[Image.Image, int] | UserError]:
    """Decode images of one form, each with its file's channels; damaged bytes yield their error, a damaged member
    raises it."""
    if isinstance(images[0], np.ndarray):
        yield from ((to_pillow(pixels), len(pixels)) for pixels in images)
    elif isinstance(images[0], Member):
        for member, data in zip(images, read_members(source, images), strict=True):
            yield _decode(data, f"{source}/{member.name}")
    else:
        for index, data in enumerate(images, first):
            try:
                yield _decode(data, f"{source}: entry {index}")
            except UserError as error:
                yield error


def _decode(data: bytes, name: str) -> tuple[Image.Image, int]:
    image = load_image(data, name)
    return plain_image(image, name), len(image.getbands())


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


if __name__ == "__main__":
    run_main(main)
