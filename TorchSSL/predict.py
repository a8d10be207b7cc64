"""Classify images: the class of each, its probability and the next most likely classes, as a CSV.

    python dataset_tool.py --source=digits --dest=digits.zip
    python predict.py --load_path ./saved_models/freematch_digits_10_1/model_best.pth --images digits.zip \\
        --out predictions.csv --html predictions.html --sort-into sorted

The checkpoint is one of any learner here, of DASO or MetaSemi, or a snapshot of EDM/train_classifier.py. Images are a
folder, a ZIP or an npz of any size; they are read batch by batch and resized as in the training. Predictions do not
depend on --batch_size or on the number of processes (torchrun). The same command again does nothing.
"""
from __future__ import annotations

import contextlib
import csv
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from shared import distributed
from shared.cli import Choice, Flag, Int, Option, Text, UserError, less_memory, parse, run_main
from shared.distributed import World
from shared.parallel import cores, one_ahead
from shared.training.files import atomic, check_writable, make_dir
from shared.training.progress import Progress
from shared.training.record import Record
from TorchSSL.audit.gallery import Section, picture, write_page
from TorchSSL.core.algorithm import BLOCK
from TorchSSL.core.classifier import Classifier, open_classifier
from TorchSSL.encoders.images import Images, list_images

FLAGS = {
    "input": (
        Option("--load_path", Text, "./saved_models/fixmatch/model_best.pth", "checkpoint of the classifier"),
        Option("--images", Text, required=True, help="folder, ZIP or npz of images", metavar="PATH"),
        Option("--use_train_model", Flag, False, "the weights as trained, not their moving average"),
        Option("--dataset -ds", Text, None, "benchmark that a checkpoint of the original code was trained on"),
        Option("--resize", Choice("square", "centre"), None, "resize images of another size as dataset_tool.py does: "
               "squeezed, or the central square (--transform=center-crop)", default_help="as in the training"),
        Option("--skip_bad", Flag, False, "leave unreadable images without a class instead of stopping"),
    ),
    "output": (
        Option("--out", Text, "predictions.csv", "file of the predictions", metavar="FILE"),
        Option("--top", Int(1), 3, "most likely classes to list", unit="classes"),
        Option("--sort-into", Text, None, "also sort the images into folders by class, as links", metavar="DIR"),
        Option("--copy", Flag, False, "with --sort-into: copy instead of linking"),
        Option("--html", Text, None, "also write a page of thumbnails by class and confidence", metavar="FILE"),
        Option("--thumbnails", Int(1), 12, "most and least certain images a class on the page", unit="images"),
        Option("--overwrite", Flag, False, "replace predictions of another classifier or other images"),
    ),
    "speed": (
        Option("--batch_size", Int(1), 256, "images read at a time", unit="images"),
        Option("--device", Text, None, "cpu, cuda or cuda:1", default_help="a GPU if available"),
    ),
}
DECIMALS = 6  # of a probability


@less_memory("--batch_size")
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    check_places(options)
    world = distributed.start(options.device)
    classifier = open_classifier(options.load_path, world.device, options.dataset, options.use_train_model)
    out, images = Path(options.out), list_images(options.images)
    settings = {name: getattr(options, name) for name in ("use_train_model", "dataset", "resize", "skip_bad", "top")}
    record = Record(out, settings, {"--load_path": options.load_path, "--images": options.images})
    make_dir(out.parent)
    if not distributed.on_main(lambda: record.is_complete(options.overwrite), world):
        predict(images, classifier, options, world)
        distributed.on_main(record.write, world)
    if world.main:
        if options.html is not None:
            write_html(images, options)
        if options.sort_into is not None:
            sort_into(images, options)
    distributed.stop()


def check_places(options: SimpleNamespace) -> None:
    """Raise UserError for outputs among the images, since the next call would read them, and for useless flags."""
    if options.copy and options.sort_into is None:
        raise UserError("--copy belongs to --sort-into")
    folder = Path(options.images).resolve()
    for flag, place in (("--out", options.out), ("--html", options.html), ("--sort-into", options.sort_into)):
        if place is not None and folder.is_dir() and Path(place).resolve().is_relative_to(folder):
            raise UserError(f"{flag} {place} lies inside --images {options.images}; choose a place outside it")
        if place is not None:
            check_writable(place, flag, is_folder=flag == "--sort-into")


# ---------------------------------------------------------------- predictions

def predict(images: Images, classifier: Classifier, options: SimpleNamespace, world: World) -> None:
    """Write the CSV. Processes take blocks of images in turn; the first one joins the parts."""
    out, blocks = Path(options.out), range(world.rank, -(-len(images) // BLOCK), world.size)
    part = out.with_name(f".{out.name}.part{world.rank}")
    together = max(1, options.batch_size // BLOCK)
    groups = [blocks[start:start + together] for start in range(0, len(blocks), together)]
    progress = Progress("predicting", len(images), "images", shown=world.main)
    threads = ThreadPoolExecutor(cores())
    try:
        with open(part, "w", newline="", encoding="utf-8") as file, contextlib.closing(progress):
            writer = csv.writer(file)
            for positions, pixels, bad in one_ahead(prepared(images, group, classifier, options, threads)
                                                    for group in groups):
                logits = classifier.logits(pixels) if len(pixels) else torch.zeros(0, len(classifier.classes))
                for position, row in zip(positions, rows_of(logits, classifier.classes, options.top), strict=True):
                    writer.writerow([images.names[position], *([""] * len(row) if position in bad else row)])
                progress.advance(min(len(images) - progress.count, len(positions) * world.size))
        distributed.barrier(world)
        if world.main:
            put_together(out, [out.with_name(f".{out.name}.part{rank}") for rank in range(world.size)], options.top,
                         len(classifier.classes))
            print(f"{len(images)} predictions: {out}")
        distributed.barrier(world)
    finally:
        threads.shutdown(cancel_futures=True)
        part.unlink(missing_ok=True)


def prepared(images: Images, blocks: Sequence[int], classifier: Classifier, options: SimpleNamespace,
             threads: ThreadPoolExecutor) -> tuple[list[int], np.ndarray, set[int]]:
    """Return (positions, uint8 [n, C, H, W], positions that cannot be read) of blocks; all but the last are whole."""
    positions = [position for block in blocks
                 for position in range(block * BLOCK, min((block + 1) * BLOCK, len(images)))]

    def make(position: int, content: bytes | np.ndarray) -> np.ndarray | None:
        try:
            image = images.decode(content, position)
        except UserError as error:
            if not options.skip_bad:
                raise UserError(f"{error}; leave such images out with --skip_bad") from None
            warnings.warn(f"{error}; it gets no class", stacklevel=2)
            return None
        return classifier.prepare(image, f"{images.path}/{images.names[position]}", options.resize, "--resize")

    made = list(threads.map(make, positions, images.read(positions)))
    bad = {position for position, pixels in zip(positions, made, strict=True) if pixels is None}
    blank = np.zeros((classifier.channels, *(classifier.size or (32, 32))), np.uint8)
    shapes = {pixels.shape for pixels in made if pixels is not None}
    if len(shapes) > 1:
        raise UserError(f"{images.path}: images of different sizes, and {classifier.path} does not record its own; "
                        "make them equal with dataset_tool.py --resolution")
    blank = next((np.zeros_like(pixels) for pixels in made if pixels is not None), blank)
    return positions, np.stack([blank if pixels is None else pixels for pixels in made]), bad


def rows_of(logits: torch.Tensor, classes: Sequence[str], top: int) -> list[list[str]]:
    """Return class, probability, second class, its probability, ... of each image. Ties go to the lower number."""
    probabilities = logits.double().softmax(1)
    order = probabilities.argsort(dim=1, descending=True, stable=True)[:, :top]
    values = probabilities.gather(1, order).tolist()
    return [[text for label, value in zip(labels, row, strict=True)
             for text in (classes[label], f"{value:.{DECIMALS}f}")]
            for labels, row in zip(order.tolist(), values, strict=True)]


def put_together(out: Path, parts: Sequence[Path], top: int, num_classes: int) -> None:
    """Write the rows of all processes in the order of the images, block by block."""
    numbers = ("", *(f"_{number}" for number in range(2, min(top, num_classes) + 1)))
    with contextlib.ExitStack() as stack:
        rows = [csv.reader(stack.enter_context(open(part, newline="", encoding="utf-8"))) for part in parts]
        with atomic(out, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", *(name + number for number in numbers for name in ("class", "probability"))])
            number = 0
            while block := list(islice(rows[number % len(rows)], BLOCK)):
                writer.writerows(block)
                number += 1


def predictions(out: Path) -> Iterator[tuple[int, str, str, float]]:
    """Yield (position, file, class, probability) of every image that has a class."""
    with open(out, newline="", encoding="utf-8") as file:
        for position, row in enumerate(csv.DictReader(file)):
            if row["class"]:
                yield position, row["file"], row["class"], float(row["probability"])


# ---------------------------------------------------------------- what is made of them

def write_html(images: Images, options: SimpleNamespace) -> None:
    """Write a page of the most and the least certain images of every class."""
    record = Record(options.html, {"thumbnails": options.thumbnails}, {"predictions": options.out})
    if record.is_complete(options.overwrite):
        return
    found: dict[str, list[tuple[float, int]]] = {}
    for position, _, name, value in predictions(Path(options.out)):
        found.setdefault(name, []).append((value, position))
    sections = []
    for name, pairs in sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0])):
        certain = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:options.thumbnails]
        uncertain = [pair for pair in sorted(pairs)[:options.thumbnails] if pair not in certain]
        rows = [(title, [picture(images.decode(content, position), images.names[position], f"{value:.1%}")
                         for (value, position), content in zip(shown, images.read([p for _, p in shown]), strict=True)])
                for title, shown in (("Most certain", certain), ("Least certain", uncertain)) if shown]
        sections.append(Section(f"{name}: {len(pairs)} images", rows))
    make_dir(Path(options.html).parent)
    introduction = [f"{sum(map(len, found.values()))} images of {images.path.name}, classified by {options.load_path}.",
                    "Below each image: its file and the probability of its class."]
    write_page(options.html, "Predictions", introduction, sections)
    record.write()
    print(f"page: {options.html}")


def sort_into(images: Images, options: SimpleNamespace) -> None:
    """Link or copy every image to DIR/<class>/<file>; existing files stay."""
    folder = make_dir(options.sort_into)
    record = Record(folder, {"copy": options.copy}, {"predictions": options.out, "--images": options.images})
    if not record.path.exists() and any(folder.iterdir()):
        raise UserError(f"--sort-into: {folder} holds other files; give a new folder")
    try:
        if record.is_complete():
            return
    except UserError:
        raise UserError(f"--sort-into: {folder} was sorted by other predictions, or into links where copies are asked "
                        "for or the reverse; give a new folder") from None
    record.begin()
    progress = Progress("sorting", len(images), "images")
    with contextlib.closing(progress):
        for position, file, name, _ in predictions(Path(options.out)):
            target = folder / folder_name(name) / (f"{file}.png" if images.files is None else file)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(target):
                place(images, position, target, options.copy)
            progress.advance()
    record.write()
    print(f"sorted: {folder}")


def place(images: Images, position: int, target: Path, copy: bool) -> None:
    """Put one image at `target`: a link to its file, or its content."""
    source = images.path / images.names[position]
    if not copy and images.path.is_dir():
        target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))
        return
    content, temporary = next(images.read([position])), target.with_name(f".{target.name}.tmp")
    if isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        images.decode(content, position).save(temporary, "PNG")
    os.replace(temporary, target)  # without the pause of `atomic`, which waits for the disk at every file


def folder_name(name: str) -> str:
    """Return a class name as the name of one folder."""
    plain = re.sub(r"[/\\\0]", "_", name)
    return plain if plain.strip(".") else f"_{plain}"


if __name__ == "__main__":
    run_main(main)
