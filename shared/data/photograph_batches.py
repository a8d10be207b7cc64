"""Batches of photographs for any range of steps, made ahead of time: by NVIDIA DALI, or by Pillow in threads.

    for images, labels in batches(photographs, view, request, range(step, total), world.device):

`request(step)` says which photographs a step wants and how to crop them, so a run continues at any step with the same
batches, and both decoders give the same pixels within one grey level.
"""
from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from shared.augment.randaugment import to_device
from shared.augment.views import normalise
from shared.cli import UserError
from shared.data.photographs import MEAN, STD, CentreCrop, Crops, Photographs, RandomCrop, central_view, random_view

DECODERS = ("auto", "dali", "torchvision")
AHEAD = 2  # batches in the making


@dataclass(frozen=True)
class Request:
    """Which photographs, int64 [n], and for random views how to crop them."""

    positions: np.ndarray
    crops: Crops | None = None


Batch = tuple[torch.Tensor, torch.Tensor]


def choose_decoder(name: str) -> str:
    """Return "dali" or "torchvision": the one asked for, or for "auto" DALI where it is installed; UserError."""
    found = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if name == "dali" and not found:
        raise UserError("NVIDIA DALI is not installed: pip install nvidia-dali-cuda130, or decode with torchvision")
    return name if name != "auto" else "dali" if found else "torchvision"


def batches(photographs: Photographs, view: RandomCrop | CentreCrop, request: Callable[[int], Request], steps: range,
            device: torch.device, workers: int = 4, decoder: str = "auto") -> Iterator[Batch]:
    """Yield (float32 [n, 3, size, size] normalised, int64 [n]) on `device` for every step.

    workers: threads that decode. An evaluation view gives the label -1 to what stands in for a bad photograph. Raises
    UserError for photographs that cannot be used.
    """
    if choose_decoder(decoder) == "dali":
        from shared.data.dali import dali_batches

        return dali_batches(photographs, view, request, steps, device, workers)
    return pillow_batches(photographs, view, request, steps, device, workers)


def pillow_batches(photographs: Photographs, view: RandomCrop | CentreCrop, request: Callable[[int], Request],
                   steps: range, device: torch.device, workers: int = 4) -> Iterator[Batch]:
    """Do as `batches`, with Pillow, in threads: it lets the others work while it decodes and resizes."""
    def make(wanted: Request, number: int) -> tuple[np.ndarray, int]:
        image, photograph = photographs.decode(int(wanted.positions[number]))
        if isinstance(view, RandomCrop):
            return random_view(image, view, wanted.crops, number), photograph.label
        return central_view(image, view), -1 if photograph.stands_in else photograph.label

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        pending: deque = deque()
        following = iter(steps)
        while True:
            for step in following:
                wanted = request(step)
                pending.append([pool.submit(make, wanted, number) for number in range(len(wanted.positions))])
                if len(pending) > AHEAD:
                    break
            if not pending:
                return
            pixels, labels = zip(*(future.result() for future in pending.popleft()), strict=True)
            images = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
            yield normalise(to_device(images.numpy(), device), MEAN, STD), to_device(np.array(labels), device)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Epochs:
    """Shuffled passes over N photographs in batches of the same size, as a function of (seed, step).

    The last batch of a pass is filled from its beginning. `length`: steps in a pass.
    """

    def __init__(self, count: int, batch: int, rng: Callable[[int, str], np.random.Generator], purpose: str) -> None:
        self.count, self.batch, self.rng, self.purpose = count, batch, rng, purpose
        self.length = -(-count // batch)
        self._order: tuple[int, np.ndarray] | None = None

    def __call__(self, step: int) -> np.ndarray:
        """Return the positions of a step, int64 [batch]."""
        epoch, place = divmod(step, self.length)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.rng(epoch, self.purpose).permutation(self.count))
        places = np.arange(place * self.batch, (place + 1) * self.batch) % self.count
        return self._order[1][places]
