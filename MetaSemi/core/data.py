"""The labelled images and the batches of a run: the published choices for the same seed, batch by batch.

Both follow from Python's own generator and `random.shuffle`, whose numbers are the same in every version 3: one
permutation splits the training set, then the labelled positions are shuffled again and again to the end of the run,
then the unlabelled ones.
"""
from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from MetaSemi.core.meta import learning_rate
from MetaSemi.core.model import ConvLarge, SmallNet, shakeshake26
from MetaSemi.core.training import CHECKPOINT, Batch, Source
from shared import distributed
from shared.augment.views import WeakPolicy, draw_weak, weak
from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.images import ImageSet, channel_statistics, shape_text
from shared.data.pool import Pool
from shared.distributed import World
from shared.training.files import write_text
from shared.training.fingerprint import fingerprints
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng

LABELS, TEST_BATCH = "label_indices.txt", 100
# Channel means and standard deviations on the unit scale, as published.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    "svhn": ((0.4376821, 0.4437697, 0.47280442), (0.19803012, 0.20101562, 0.19703614)),
    "digits": ((0.305,), (0.376,)),
}
# Digits are neither mirrored nor shifted by half their width.
AUGMENTATION = {
    "cifar10": WeakPolicy(flip=True, pad=4, pad_mode="zero"), "cifar100": WeakPolicy(flip=True, pad=4, pad_mode="zero"),
    "svhn": WeakPolicy(flip=False, pad=4, pad_mode="zero"), "digits": WeakPolicy(flip=False, pad=1, pad_mode="zero"),
}


def shuffle(values: list[int], draw_bits: Callable[[int], int]) -> None:
    """Do what `random.shuffle(values)` does with the generator of `draw_bits` (its `getrandbits`), twice as fast."""
    end = len(values) - 1
    while end > 0:
        bits = (end + 1).bit_length()
        last = max(1, (1 << (bits - 1)) - 1)  # down to here, as many bits are drawn
        for i in range(end, last - 1, -1):
            j = draw_bits(bits)
            while j > i:
                j = draw_bits(bits)
            values[i], values[j] = values[j], values[i]
        end = last - 1


def split(targets: np.ndarray, labels_per_class: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Return (labelled, unlabelled) positions, int32, disjoint and together all, in the order of one permutation.

    targets: int [N], classes 0 to max(targets). A class with fewer images than `labels_per_class` gives all it has.
    """
    order = list(range(len(targets)))
    shuffle(order, rng.getrandbits)
    positions = np.array(order, np.int32)
    labels = np.asarray(targets)[positions]
    taken = np.zeros(len(positions), bool)
    for label in range(int(labels.max()) + 1):
        taken[np.flatnonzero(labels == label)[:labels_per_class]] = True
    return positions[taken], positions[~taken]


class Stream:
    """Positions in the order a run takes them: one shuffled list after another, each made from the one before.

    One permutation is in memory at a time. `epochs` shuffles belong to a run of `length` positions, also where the
    last of them is not begun.
    """

    def __init__(self, positions: Sequence[int] | np.ndarray, length: int, rng: random.Random) -> None:
        self.values, self.rng = [int(position) for position in positions], rng
        self.epochs = length // len(self.values) + 1
        self.array = np.empty(0, np.int32)
        self.begin = 0  # place in the stream of array[0]
        self.done = 0   # shuffles

    def take(self, start: int, count: int) -> np.ndarray:
        """Return the positions start .. start + count - 1 of the stream, int32; `start` may not go back."""
        if start < self.begin:
            raise ValueError(f"the stream is at {self.begin} already, it cannot go back to {start}")
        parts, end = [], start + count
        while True:
            stop = self.begin + len(self.array)
            if start < stop:
                parts.append(self.array[start - self.begin:min(end, stop) - self.begin])
                start = min(end, stop)
            if start >= end:
                return np.concatenate(parts) if parts else np.empty(0, np.int32)
            shuffle(self.values, self.rng.getrandbits)
            self.begin, self.array, self.done = stop, np.array(self.values, np.int32), self.done + 1

    def skip_all(self) -> None:
        """Take all draws of this stream from its generator; the next stream begins there."""
        for _ in range(self.epochs - self.done):
            shuffle(self.values, self.rng.getrandbits)
        self.done, self.array = self.epochs, np.empty(0, np.int32)


def streams(labeled: np.ndarray, unlabeled: np.ndarray | None, length: int,
            rng: random.Random) -> tuple[Stream, Stream | None]:
    """Return the streams of labelled and unlabelled positions, `length` each; `rng` as `split` has left it."""
    own = random.Random()
    own.setstate(rng.getstate())
    first = Stream(labeled, length, own)
    if unlabeled is None:
        return first, None
    # The unlabelled stream begins where the labelled one leaves the generator.
    Stream(labeled, length, rng).skip_all()
    return first, Stream(unlabeled, length, rng)


def statistics(dataset: str, images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, standard deviation) of the channels: published, or those of own training images."""
    return NORMALISATION.get(dataset) or channel_statistics(images)


class Batches:
    """Makes the batches of a run, step after step.

    size: labelled images in the global batch, and as many unlabelled ones; every rank has an equal part. Raises
    UserError where ranks cannot share it evenly.
    """

    def __init__(self, images: ImageSet, pools: tuple[Stream, Stream | None], dataset: str, size: int, seed: int,
                 world: World, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self.streams, self.size, self.seed, self.world = pools, size, seed, world
        self.pool = Pool(images, *statistics(dataset, images), world.device)
        own = WeakPolicy(flip=True, pad=max(1, min(images.size) // 8), pad_mode="zero")
        self.policy, self.image_size = AUGMENTATION.get(dataset, own), images.size
        self.memory_format = memory_format
        if size % world.size:
            raise UserError(f"--batch-size {size} cannot be shared evenly by {world.size} processes; choose a multiple "
                            "of their number")
        self.part = world.slice(size)

    def __call__(self, step: int) -> Batch:
        """Return the batch of `step`; steps may not go back."""
        labeled, labels = self.draw(self.streams[0], step, "labeled")
        if self.streams[1] is None:
            return Batch(labeled, labels, None, None)
        return Batch(labeled, labels, *self.draw(self.streams[1], step, "unlabeled"))

    def draw(self, stream: Stream, step: int, purpose: str) -> tuple[Tensor, Tensor]:
        """Return this rank's images and labels of a stream in `step`."""
        positions = stream.take(step * self.size, self.size)[self.part].astype(np.int64)
        draws = draw_weak(self.size, numpy_rng(self.seed, step, f"{purpose} crop"), self.image_size, self.policy)
        images = weak(self.pool.take(positions), draws[self.part], self.pool.mean, self.pool.std)
        labels = self.pool.labels[to_device(positions, self.world.device)]
        return images.contiguous(memory_format=self.memory_format), labels


class SmallImages(Source):
    """The source of train_meta.py and train_baseline.py: a data set in memory, some of its images labelled."""

    # A step is a fifth faster on a CPU when freed memory is kept, and ConvLarge with batches of 128 then takes 2.5 GB
    # in place of 1.5.
    keep_memory_up_to = 64

    def __init__(self, options: SimpleNamespace, world: World, unlabeled: bool) -> None:
        self.options, self.world = options, world
        self.batch, self.length, self.first, self.total = (
            options.batch_size, options.test_freq, options.start_step, options.total_steps)
        self.layout = torch.contiguous_format if options.strict else torch.channels_last
        train, test = (load_dataset(options.dataset, part, options.data_path, options.download)
                       for part in ("train", "test"))
        rng = random.Random(options.seed)
        self.labeled, rest = split(train.labels, options.num_label // options.num_classes, rng)
        if unlabeled and not len(rest):
            raise UserError(f"--num-label {options.num_label}: no unlabelled images are left of {len(train)}; give "
                            "fewer labels")
        self._warn_of_split(train.labels[self.labeled])
        pools = streams(self.labeled, rest if unlabeled else None, self.total * self.batch, rng)
        self.batches = Batches(train, pools, options.dataset, self.batch, options.seed, world, self.layout)
        if (test.channels, test.size) != (train.channels, train.size) or test.labels.min() < 0:
            raise UserError(f"--dataset {options.dataset}: test images are {shape_text(test)}, training images "
                            f"{shape_text(train)}; they must be equal, and every test image needs a label")
        if test.labels.max() >= options.num_classes:
            raise UserError(f"--dataset {options.dataset}: test images have a class {test.labels.max()}, training "
                            f"images only 0 to {options.num_classes - 1}")
        self.test = Pool(test, *statistics(options.dataset, train), world.device)
        self.channels, self.rest, self.classes, self.size = train.channels, len(rest), train.classes, train.size
        self.inputs = distributed.on_main(lambda: fingerprints({"--dataset": train, "--dataset (test)": test}), world)

    def _warn_of_split(self, labels: np.ndarray) -> None:
        wanted, classes = self.options.num_label, self.options.num_classes
        counts = np.bincount(labels, minlength=classes)
        if wanted % classes:
            warnings.warn(f"--num-label {wanted} is no multiple of {classes} classes: {counts.sum()} images are "
                          "labelled", stacklevel=2)
        elif counts.min() < wanted // classes:
            warnings.warn(f"class {counts.argmin()} has only {counts.min()} images, all of them are labelled",
                          stacklevel=2)

    def __str__(self) -> str:
        return f"{len(self.labeled)} labelled and {self.rest} unlabelled images, {len(self.test)} test images"

    def images_seen(self) -> dict[str, Any]:
        pool = self.test
        return {"classes": self.classes, "mean": pool.mean, "std": pool.std, "size": self.size}

    def normalise_as(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        for pool in (self.batches.pool, self.test):
            pool.mean, pool.std = mean, std

    def check(self, folder: Path) -> None:
        """Refuse to continue a run with labelled images other than its own; UserError."""
        options = self.options
        beside = (Path(options.resume).parent if options.resume else folder) / LABELS
        if options.overwrite or not (options.resume or (folder / CHECKPOINT).exists()) or not beside.exists():
            return
        if beside.read_text(encoding="utf-8") != label_text(self.labeled):
            raise UserError(f"{beside} lists other labelled images than --seed {options.seed} --num-label "
                            f"{options.num_label} of {options.dataset}; give the options of that run, or another "
                            "--save-path")

    def opened(self, folder: Path) -> None:
        write_text(folder / LABELS, label_text(self.labeled))

    def network(self) -> torch.nn.Module:
        options = self.options
        if options.architecture == "convlarge":
            return ConvLarge(self.channels, options.num_classes)
        if options.architecture == "shakeshake":
            return shakeshake26(options.num_classes, random_eval=getattr(options, "eval_gate", "random") == "random")
        return SmallNet(self.channels, options.num_classes)

    def stream(self, first: int, stop: int) -> Iterator[Batch]:
        return map(self.batches, range(first, stop))

    def rate(self, step: int) -> float:
        options = self.options
        return learning_rate(step, options.lr, options.warmup, options.gamma, options.milestones)

    def place(self, step: int) -> dict[str, int]:
        return {"step": step, "total": self.total}

    def test_batches(self) -> tuple[Iterator[tuple[Tensor, Tensor] | None], int]:
        return in_order(self.test, TEST_BATCH, self.world), -(-len(self.test) // TEST_BATCH)

    def facts(self, state: dict[str, Any]) -> dict[str, Any]:
        options = self.options
        return {"dataset": options.dataset, "num_labels": options.num_label, "mix_up": options.mix_up,
                "test_images": len(self.test), "accuracy": {"best_iteration": state.get("best_step")}}


def in_order(pool: Pool, size: int, world: World) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Yield (images, labels) of all images by `size`, in order, and None for the batches of other ranks."""
    for number, start in enumerate(range(0, len(pool), size)):
        if number % world.size != world.rank:
            yield None
            continue
        positions = np.arange(start, min(start + size, len(pool)))
        yield pool.normalised(positions), pool.labels[to_device(positions, world.device)]


def label_text(labeled: np.ndarray) -> str:
    """Return the content of label_indices.txt: the labelled positions in the order taken, one a line."""
    return "".join(f"{position}\n" for position in labeled.tolist())
