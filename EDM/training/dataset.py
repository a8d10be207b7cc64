"""The training data of EDM: a folder or ZIP of square images with one-hot or vector labels, the order in which images
are seen, and the batches of the steps, each a function of the number of images seen before it.
"""
from __future__ import annotations

import errno
import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from EDM.sampling.conditions import describe_labels
from shared.cli import UserError
from shared.data.classes import LABEL_FILE, has_names
from shared.data.images import read_images
from shared.distributed import World
from shared.training.precision import to_device

DEVICE_FRACTION = 0.4  # of the GPU's free memory that the training set may take


# ---------------------------------------------------------------------------------------------------- the images

@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Images with conditioning labels; item i is image `indices[i]`, mirrored left to right where `flipped[i]`.

    images: uint8 [N, C, R, R], memory-mapped; without mirrored copies.
    raw_labels: int64 [N] (class numbers), float32 [N, D] (vectors as in dataset.json) or float32 [N, 0] (no labels).
    indices: int64 [items]; after max_size and xflip.
    flipped: bool [items].
    label_dim: width of the network's label input; number of classes, D, or 0.
    name: base name of the path without its last extension.
    classes: their names, in label order; () if they are numbers.
    """

    images: np.ndarray
    raw_labels: np.ndarray
    indices: np.ndarray
    flipped: np.ndarray
    label_dim: int
    name: str
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (uint8 [C, R, R], float32 [label_dim]) of one item."""
        image = self.images[self.indices[item]]
        return (image[:, :, ::-1] if self.flipped[item] else image).copy(), self.labels[self.indices[item]]

    @cached_property
    def labels(self) -> np.ndarray:
        """float32 [N, label_dim]: the network input of every image."""
        return np.eye(self.label_dim, dtype=np.float32)[self.raw_labels] if self.has_onehot_labels else self.raw_labels

    @property
    def num_channels(self) -> int:
        return self.images.shape[1]

    @property
    def resolution(self) -> int:
        return self.images.shape[2]

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def has_onehot_labels(self) -> bool:
        return self.raw_labels.dtype == np.int64

    def describe_labels(self) -> dict[str, Any]:
        """Return the record of the labels for snapshots: names and counts, or the vectors that occur."""
        named = self.classes if len(self.classes) == self.label_dim else ()
        return describe_labels(self.raw_labels[self.indices], self.label_dim, named)

    def details(self, item: int) -> dict[str, object]:
        """Return which image an item is, whether it is mirrored, and its label as dataset.json has it."""
        index = self.indices[item]
        return {"raw_idx": int(index), "xflip": bool(self.flipped[item]), "raw_label": self.raw_labels[index].tolist()}


def open_training_set(path: str | os.PathLike, use_labels: bool = False, max_size: int | None = None,
                      xflip: bool = False, seed: int = 0, resolution: int | None = None) -> TrainingSet:
    """Open a folder, ZIP or npz of equal square images (shared/data/images.py says which forms there are).

    use_labels: take the labels of dataset.json, or of class sub-folders; every image must have one. A set without any
        label gives label_dim 0, which the caller must not take for a conditional set.
    max_size: keep that many images, drawn with `seed`, in their order.
    xflip: append a mirrored copy of every kept image, which doubles the length.

    The label width is the largest class that occurs plus one, unless the set names its classes (sub-folders, npz).
    Raises UserError for unreadable files, images that are not square or not `resolution`, and missing labels.
    """
    path = os.fspath(path)
    if not os.path.exists(path) and path.lower().endswith((".zip", ".npz")):
        raise UserError(str(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)))
    if not (os.path.isdir(path) or path.lower().endswith((".zip", ".npz"))):
        raise UserError(f"{path}: Path must point to a directory or zip")
    images = read_images(path, resolution=resolution)
    if images.size[0] != images.size[1]:
        raise UserError(f"{path}: the images are {images.size[1]}x{images.size[0]}, but must be square; "
                        "see dataset_tool.py --transform")
    raw_labels, label_dim = np.zeros((len(images), 0), np.float32), 0
    if use_labels and images.vectors is not None:
        raw_labels, label_dim = images.vectors, images.vectors.shape[1]
    elif use_labels and images.has_labels:
        raw_labels, label_dim = images.labels, images.num_classes
        if missing := int((raw_labels < 0).sum()):
            raise UserError(f"{path}: {missing} of {len(images)} images have no label; label them all, or train "
                            "without labels (--cond=0)")
        if os.path.exists(os.path.join(path, "00000", "img00000000.png")) and not os.path.exists(
                os.path.join(path, LABEL_FILE)):
            warnings.warn(f"{path}: without {LABEL_FILE} the folders count as classes, but these are named as "
                          "dataset_tool.py numbers images, a thousand to a folder", stacklevel=2)
        if absent := sorted(set(range(label_dim)) - set(raw_labels.tolist())):
            warnings.warn(f"{path}: no image of class {', '.join(map(str, absent[:10]))}: the network cannot learn it",
                          stacklevel=2)
    indices = np.arange(len(images))
    if max_size is not None and max_size < len(images):
        # The published order of draws: a subset holds the same images everywhere.
        np.random.RandomState(seed % (1 << 31)).shuffle(indices)
        indices = np.sort(indices[:max_size])
    flipped = np.zeros(len(indices), bool)
    if xflip:
        indices, flipped = np.tile(indices, 2), np.repeat([False, True], len(indices))
    name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
    classes = images.classes if label_dim and has_names(images.classes) else ()
    return TrainingSet(images.images, raw_labels, indices, flipped, label_dim, name, classes)


def open_data(path: str, use_labels: bool, xflip: bool) -> TrainingSet:
    """Open the training set of --data; UserError if it cannot be read or lacks the labels that --cond needs."""
    try:
        dataset = open_training_set(path, use_labels=use_labels, xflip=xflip)
    except (OSError, UserError) as error:
        message = str(error)
        raise UserError(message if message.startswith("--data") else f"--data: {message}") from None
    if use_labels and not dataset.label_dim:
        raise UserError("--cond=True requires labels specified in dataset.json; "
                        f"{path} has none: add them, or train with --cond=0")
    return dataset


# ----------------------------------------------------------------------------------------------------- the order

class InfiniteOrder:
    """The published data order, one endless sequence of indices into a training set.

    The items are shuffled once, then read cyclically; after each reading the item changes places with one read fewer
    than `window` x size positions before, so passes differ. The sequence is a function of (size, seed) alone: position
    n is image n of the run for any number of processes W; rank r takes those with n mod W = r.

    size: number of items; seed: of NumPy's legacy generator; window: fraction of the set, 0 repeats one permutation.
    """

    def __init__(self, size: int, seed: int, window: float = 0.5) -> None:
        self.size, self.seed, self.window = size, seed, int(np.rint(size * window))
        self._restart()

    def _restart(self) -> None:
        self.position = 0
        self._taken: dict[int, np.ndarray] = {}
        self._random = np.random.RandomState(self.seed)
        shuffled = np.arange(self.size)
        self._random.shuffle(shuffled)
        self._order = shuffled.tolist()

    def take(self, start: int, count: int) -> np.ndarray:
        """Return the indices, int64 [count], at the positions start, start + 1, ...

        Reading on from the last call, or one of the last two readings again, is cheap; going back otherwise starts
        over from position 0, at about five million positions a second.
        """
        taken = self._taken.get(start)
        if taken is not None and len(taken) == count:
            return taken
        if start < self.position:
            self._restart()
        while self.position < start:
            self._advance(min(start - self.position, 1 << 20))
        self._taken = dict([*self._taken.items(), (start, np.array(self._advance(count), dtype=np.int64))][-2:])
        return self._taken[start]

    def _advance(self, count: int) -> list[int]:
        order, size, read = self._order, self.size, []
        swaps = self._random.randint(self.window, size=count).tolist() if self.window >= 2 else None
        for offset in range(count):
            here = (self.position + offset) % size
            read.append(order[here])
            if swaps is not None:
                there = (here - swaps[offset]) % size
                order[here], order[there] = order[there], order[here]
        self.position += count
        return read

    # The state only saves a resumed run the way from position 0.

    def state_dict(self) -> dict[str, Any]:
        key, place = self._random.get_state()[1:3]
        return {"set": [self.size, self.seed, self.window], "position": self.position,
                "order": torch.tensor(self._order), "key": torch.from_numpy(key.astype(np.int64)), "place": int(place),
                "taken": {start: torch.from_numpy(indices) for start, indices in self._taken.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; one of another set or seed is passed over, as the order is then another one."""
        if state["set"] != [self.size, self.seed, self.window]:
            return
        self.position, self._order = int(state["position"]), state["order"].tolist()
        self._taken = {start: indices.numpy() for start, indices in state["taken"].items()}
        self._random.set_state(("MT19937", state["key"].numpy().astype(np.uint32), int(state["place"]), 0, 0.0))


# --------------------------------------------------------------------------------------------------- the batches

@dataclass(frozen=True)
class Batch:
    """One process's part of a step's images, on the device.

    images: float32 [n, C, R, R] in [-1, 1]. labels: float32 [n, label_dim]. places: int64 [n] on the host, where in
    the global batch each image stands.
    """

    images: torch.Tensor
    labels: torch.Tensor
    places: np.ndarray


class Batches:
    """Serves the batch that starts at image number `nimg`.

    The set lies on the device as uint8 where it fits, and a batch is then an index. Otherwise it stays in
    (memory-mapped) files and the next batch is read while the device works on this one.
    """

    def __init__(self, dataset: TrainingSet, order: InfiniteOrder, batch: int, world: World) -> None:
        self.dataset, self.order, self.batch, self.device = dataset, order, batch, world.device
        # As published, the images of the global batch are dealt to the ranks one by one.
        self.places = np.arange(batch)[world.rank::world.size]
        self.classes = torch.as_tensor(np.asarray(dataset.raw_labels)).to(self.device)
        self.resident = self._to_device()
        self._ahead: tuple[int, Future] | None = None
        self._thread = ThreadPoolExecutor(1) if self.device.type == "cuda" and self.resident is None else None

    def _to_device(self) -> torch.Tensor | None:
        images = self.dataset.images
        if self.device.type != "cuda" or images.nbytes > DEVICE_FRACTION * torch.cuda.mem_get_info(self.device)[0]:
            return None
        resident = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
        for start in range(0, len(images), 4096):  # in pieces: the host never holds the whole set
            resident[start:start + 4096] = torch.from_numpy(np.array(images[start:start + 4096]))
        return resident

    def __call__(self, nimg: int) -> Batch:
        items = self._items(nimg)
        sources = to_device(self.dataset.indices[items], self.device)
        if self.resident is not None:
            pixels = self.resident[sources]
        elif self._thread is not None:
            pixels = self._read_ahead(nimg).to(self.device, non_blocking=True)
        else:
            pixels = self._read(items).to(self.device, non_blocking=True)
        mirrored = self.dataset.flipped[items]
        if mirrored.any():
            pixels = torch.where(to_device(mirrored, self.device)[:, None, None, None], pixels.flip(3), pixels)
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
        return Batch(images, self._labels(sources), self.places)

    def _items(self, nimg: int) -> np.ndarray:
        return self.order.take(nimg, self.batch)[self.places]

    def _labels(self, sources: torch.Tensor) -> torch.Tensor:
        labels = self.classes[sources]
        if self.dataset.label_dim and self.dataset.has_onehot_labels:
            return torch.nn.functional.one_hot(labels, self.dataset.label_dim).to(torch.float32)
        return labels.to(torch.float32)

    def _read(self, items: np.ndarray) -> torch.Tensor:
        return self._pinned(torch.from_numpy(self.dataset.images[self.dataset.indices[items]]))

    def _read_ahead(self, nimg: int) -> torch.Tensor:
        """Return the pixels of the batch at `nimg`, and set the thread on the one after it."""
        now = self._ahead[1].result() if self._ahead and self._ahead[0] == nimg else self._read(self._items(nimg))
        after = nimg + self.batch
        self._ahead = after, self._thread.submit(self._read, self._items(after))
        return now

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor  # a GPU fetches from there by itself
