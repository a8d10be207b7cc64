"""Where images to be scored come from: files, or a network that makes them. A batch at a time; nothing is kept."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from EDM.sampling.files import RECORD, archive_record, read_record
from EDM.sampling.seeds import chosen_classes, load_sampler
from shared.cli import UserError
from shared.data.classes import ImageFiles, find_images, labels_of
from shared.data.images import ImageSet, open_image, read_images, to_chw
from shared.data.safe import read_members
from shared.distributed import World
from shared.parallel import cores
from shared.training.randomness import split_batches

DECODERS = 4  # threads at most, each with one batch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Source(Protocol):
    """Images by position 0..len - 1, each of which is asked for once.

    Those with labels may have `classes`: names in label order.
    """

    def __len__(self) -> int: ...

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each part (positions) its uint8 [n, C, H, W] and its classes int64 [n], -1 unknown."""


class FileImages:
    """The images in a folder (with sub-folders), ZIP or npz, in the order of their names.

    channels: 3 repeats gray images; 1 takes gray images only. count: a random choice of that many, by `seed`, in the
    same order; None: all. labelled: read the classes, from dataset.json or the names of class folders. Raises UserError
    for a path that holds no images or fewer than count, and later for a damaged image or one of another size.
    """

    def __init__(self, path: str, channels: int = 3, count: int | None = None, seed: int = 0,
                 labelled: bool = False) -> None:
        self.path, self.channels = Path(path), channels
        if not self.path.exists():
            raise UserError(f"{path}: no such file or folder")
        self.content: ImageFiles | ImageSet
        if self.path.suffix.lower() == ".npz":
            self.content = read_images(self.path)
            self.total, self.labels, self.classes = len(self.content), self.content.labels, self.content.classes
        else:
            self.content = find_images(self.path)
            self.total = len(self.content.members)
            self.content.warn()
            unknown = np.full(self.total, -1, np.int64), ()
            self.labels, self.classes = read_labels(self.content) if labelled else unknown
        if not self.total:
            raise UserError(f"{path}: No image files found in the specified path")
        if count is not None and self.total < count:
            raise UserError(f"{path}: Found {self.total} images, but expected at least {count}; set --num")
        self.chosen = subset(self.total, count, seed)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def all_labelled(self) -> bool:
        return bool((self.labels[self.chosen] >= 0).all())

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings that generate.py recorded beside its images; None without, or where class folders differ."""
        if self.path.is_dir():
            records = [read_record(file) for file in (self.path / RECORD, *sorted(self.path.glob(f"*/{RECORD}")))]
        else:
            records = [read_record(archive_record(self.path))]
        known = [{name: value for name, value in record.items() if name not in ("class", "classes", "seeds")}
                 for record in records if record is not None]
        return known[0] if known and all(record == known[0] for record in known) else None

    @property
    def seeds(self) -> str | None:
        """The seeds that the files are named after, e.g. "0-49999", or that are recorded of an archive; else None."""
        record = None if self.path.is_dir() else read_record(archive_record(self.path))
        if record is not None and len(self) == self.total:
            return seed_range(record["seeds"])
        names = self.content.names if isinstance(self.content, ImageFiles) else []
        stems = [PurePosixPath(names[index]).stem for index in self.chosen] if names else []
        numbered = stems and all(stem.isascii() and stem.isdigit() for stem in stems)
        return seed_range(map(int, stems)) if numbered else None

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        size: tuple[int, ...] | None = None
        for images, labels in threaded_map(self._read, parts):
            if len(images):
                size = size or images.shape[2:]
                _check_size(self.path, images.shape[2:], size)
            yield torch.from_numpy(images), torch.from_numpy(labels)

    def _read(self, part: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.chosen[np.asarray(part, np.int64)]
        if isinstance(self.content, ImageSet):
            images = self.content.images[chosen]
            if self.channels == 1 and images.shape[1] == 3:
                raise UserError(f"{self.path}: has colour images, the detector takes gray ones")
            images = np.repeat(images, self.channels // images.shape[1], axis=1)
        else:
            images = self._decode(self.content, chosen)
        return images, self.labels[chosen]

    def _decode(self, files: ImageFiles, chosen: np.ndarray) -> np.ndarray:
        members, images = [files.members[index] for index in chosen], []
        for member, data in zip(members, read_members(files.path, members), strict=True):
            name = f"{files.path}/{member.name}"
            image = open_image(data, name)
            if self.channels == 1 and image.mode != "L":
                raise UserError(f"{name}: has colour, the detector takes gray images")
            images.append(to_chw(image, self.channels))
            _check_size(name, images[-1].shape[1:], images[0].shape[1:])
        return np.stack(images) if images else np.zeros((0, self.channels, 1, 1), np.uint8)


def _check_size(name: str | Path, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise UserError(f"{name}: {found[1]}x{found[0]} and {expected[1]}x{expected[0]} pixels; all images must have "
                        "one size")


class SetImages:
    """The images of a set in memory, as a source; gray ones repeated to `channels`."""

    def __init__(self, images: ImageSet, channels: int) -> None:
        self.images, self.classes, self.repeat = images, images.classes, channels // images.channels
        if not self.repeat:
            raise UserError(f"{images.name}: has colour images, the detector takes gray ones")

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            chosen: Any = np.asarray(part, np.int64)
            pixels = torch.from_numpy(np.array(self.images.images[chosen]))
            yield pixels.repeat(1, self.repeat, 1, 1), torch.from_numpy(self.images.labels[chosen])


class GeneratedImages:
    """The images of seeds, made by a network and never written: byte for byte those that generate.py writes.

    flags: checked flags of generate.py with `seeds`, `batch` and what it was told of classes. channels: as in
    FileImages.
    """

    def __init__(self, flags: SimpleNamespace, world: World, channels: int = 3) -> None:
        self.sampler, self.settings = load_sampler(flags, world)
        self.channels, self.net, self.classes = channels, self.sampler.net, self.sampler.trained.names
        if channels == 1 and self.net.img_channels == 3:
            raise UserError(f"{flags.network}: makes colour images, the detector takes gray ones")
        classes = chosen_classes(flags, self.net.label_dim, self.sampler.trained)
        self.samples = [(seed, index) for index in classes for seed in flags.seeds]
        self.rows = self.sampler.batch_rows(split_batches(self.samples, flags.batch, world.size))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def all_labelled(self) -> bool:
        return self.net.label_dim > 0

    @property
    def seeds(self) -> str:
        return seed_range(seed for seed, _ in self.samples)

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            if not part:
                yield torch.zeros(0, self.channels, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
                continue
            seeds, classes = zip(*(self.samples[index] for index in part), strict=True)
            images = self.sampler.images(seeds, classes, self.rows)
            labels = [drawn if given is None else given
                      for drawn, given in zip(self.sampler.classes(seeds), classes, strict=True)]
            yield images.repeat(1, self.channels // images.shape[1], 1, 1), torch.tensor(labels)


def seed_range(seeds: Iterable[int]) -> str:
    """Return e.g. "0-49999", or "0-9, 7 of them" where some in between are missing."""
    found = set(seeds)
    first, last = min(found), max(found)
    return f"{first}-{last}" + ("" if len(found) == last - first + 1 else f", {len(found)} of them")


def subset(total: int, count: int | None, seed: int) -> np.ndarray:
    """Return int64 positions of `count` of `total` images, chosen as EDM's data set chooses them, in rising order."""
    order = np.arange(total)
    if count is not None and count < total:
        np.random.RandomState(seed % 2**31).shuffle(order)
        order = np.sort(order[:count])
    return order


def read_labels(files: ImageFiles) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the classes int64 [N] that a list or else the names of class folders give, -1 where unknown, and their
    names."""
    if any(isinstance(label, list) for label in files.labels.values()):
        raise UserError(f"{files.path}: labels are lists of numbers, expected a class for each image")
    found = labels_of(files, files.path)
    return (np.full(len(files), -1, np.int64), ()) if found is None else found


def threaded_map(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield function(item) in order, computed a few items ahead in threads."""
    workers = min(DECODERS, cores())
    with ThreadPoolExecutor(workers) as pool:
        waiting = iter(items)
        pending = deque(pool.submit(function, item) for item in islice(waiting, workers))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(waiting, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
