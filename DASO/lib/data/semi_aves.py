"""Semi-Aves (Su and Maji, FGVC7 2020): birds of 200 species, with unlabelled images of these and of 800 others.

The files are those of the data set's own release: `l_train.txt`, `val.txt`, `u_train_in.txt`, `u_train_out.txt` and
`test.txt`, one `path/to/image.jpg label` a line (an unknown label may be missing), and the photographs
below the same folder. `l_train_val.txt`, if there is no `l_train.txt`, is taken for the labelled images.
"""
from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from shared.cli import UserError
from shared.data.cache import Allocate, Stored, cached
from shared.data.images import ImageSet, open_image, to_chw
from shared.data.listing import read_lines
from shared.parallel import ordered_map
from shared.training.fingerprint import fingerprint, fingerprint_files
from shared.training.progress import Progress

LISTS = {"labelled": ("l_train.txt", "l_train_val.txt"), "valid": ("val.txt",), "in": ("u_train_in.txt",),
         "out": ("u_train_out.txt",), "test": ("test.txt",)}
SUFFIXES = (".jpg", ".jpeg", ".png")
CHUNK = 64  # photographs that a worker decodes at a time


def load_semi_aves(root: Path, stored_side: int, unlabelled: str) -> dict[str, ImageSet | None]:
    """Return the sets labelled, unlabelled, valid and test below `root`, the last three None without their list.

    unlabelled: "in", "out", "in_out", or "" for none. Every photograph is decoded once: its shorter side becomes
    `stored_side` pixels and its middle square is kept (about 30 GB for all of them at 256), in the cache of decoded
    images. Raises UserError for missing or damaged files.
    """
    labelled = _read_list(root, "labelled", stored_side)
    classes = tuple(str(label) for label in range(int(labelled.labels.max()) + 1))
    parts = [_read_list(root, name, stored_side) for name in ("in", "out") if name in unlabelled.split("_")]
    pool = None
    if parts:
        labels = np.concatenate([part.labels for part in parts])
        images = parts[0].images if len(parts) == 1 else np.concatenate([part.images for part in parts])
        # Images of other species have no class here.
        pool = ImageSet(images, np.where(labels < len(classes), labels, -1), classes, "semi_aves unlabelled")
    held_out = {name: _with_classes(_read_list(root, name, stored_side), classes) if (root / file).exists() else None
                for name, (file,) in (("valid", LISTS["valid"]), ("test", LISTS["test"]))}
    return {"labelled": _with_classes(labelled, classes), "unlabelled": pool, **held_out}


def _with_classes(images: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    if images.labels.min() < 0 or images.labels.max() >= len(classes):
        raise UserError(f"{images.name}: labels must be 0 to {len(classes) - 1}, as in the labelled list; found "
                        f"{images.labels.min()} to {images.labels.max()}")
    return ImageSet(images.images, images.labels, classes, images.name)


def _read_list(root: Path, name: str, side: int) -> ImageSet:
    file = next((root / candidate for candidate in LISTS[name] if (root / candidate).exists()), None)
    if file is None:
        raise UserError(f"semi_aves: {' or '.join(LISTS[name])} not found in {root}; put the split files of the data "
                        "set and its photographs there (DATASET.ROOT)")
    paths, labels = parse_list(file)
    absent = next((path for path in paths if not (root / path).is_file()), None)
    if absent is not None:
        raise UserError(f"{file}: names {absent}, which is not below {root}")

    def read(allocate: Allocate) -> Stored:
        array = allocate((len(paths), 3, side, side))
        starts = range(0, len(paths), CHUNK)
        chunks = [(root, tuple(paths[start:start + CHUNK]), side) for start in starts]
        with closing(Progress(f"decoding {file.stem}", len(paths), "images")) as progress:
            for start, images in zip(starts, ordered_map(_decode, chunks), strict=True):
                array[start:start + len(images)] = images
                progress.advance(len(images))
        return Stored(array, labels)

    key = ["semi_aves", side, fingerprint(file), fingerprint_files(root, paths)]
    stored = cached(f"semi_aves_{file.stem}", key, read)
    return ImageSet(stored.images, stored.labels, (), f"semi_aves {file.stem}")


def parse_list(file: Path) -> tuple[list[str], np.ndarray]:
    """Return the paths and int64 labels (-1 where a line has none) of a split file; UserError, naming the line."""
    paths, labels = [], []
    for number, line in read_lines(file, "a list of paths and labels"):
        path, label = line.rsplit(None, 1) if len(line.split()) > 1 else (line, "-1")
        if label.lower().endswith(SUFFIXES):  # a line without a label
            path, label = line, "-1"
        inside = path and not Path(path).is_absolute() and ".." not in Path(path).parts
        if not label.lstrip("-").isdigit() or int(label) < -1 or not inside:
            raise UserError(f"{file}, line {number}: expected a path inside the folder and a label, got {line[:80]!r}")
        paths.append(path.strip())
        labels.append(int(label))
    if not paths:
        raise UserError(f"{file}: names no images")
    return paths, np.array(labels, np.int64)


def _decode(work: tuple[Path, tuple[str, ...], int]) -> np.ndarray:
    """Decode photographs to uint8 [n, 3, side, side]: shorter side to `side`, then the middle square."""
    root, paths, side = work
    images = np.empty((len(paths), 3, side, side), np.uint8)
    for index, path in enumerate(paths):
        image = open_image((root / path).read_bytes(), str(root / path)).convert("RGB")
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - side) // 2, (height - side) // 2
        images[index] = to_chw(image.crop((left, top, left + side, top + side)), 3)
    return images
