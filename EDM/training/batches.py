"""The images of a training step, as a function of how many images came before."""
from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from EDM.training.dataset import TrainingSet
from EDM.training.order import InfiniteOrder
from shared.distributed import World

# Share of the GPU's free memory that the training set may take.
DEVICE_SHARE = 0.4


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
        if self.device.type != "cuda" or images.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return None
        resident = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
        for start in range(0, len(images), 4096):  # in pieces, so that the host never holds the whole set
            resident[start:start + 4096] = torch.from_numpy(np.array(images[start:start + 4096]))
        return resident

    def __call__(self, nimg: int) -> Batch:
        items = self._items(nimg)
        sources = self._send(torch.from_numpy(self.dataset.indices[items]))
        if self.resident is not None:
            pixels = self.resident[sources]
        elif self._thread is not None:
            pixels = self._read_ahead(nimg).to(self.device, non_blocking=True)
        else:
            pixels = self._read(items).to(self.device, non_blocking=True)
        mirrored = self.dataset.flipped[items]
        if mirrored.any():
            pixels = torch.where(self._send(torch.from_numpy(mirrored))[:, None, None, None], pixels.flip(3), pixels)
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

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._pinned(tensor).to(self.device, non_blocking=True)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor  # a GPU fetches from there by itself
