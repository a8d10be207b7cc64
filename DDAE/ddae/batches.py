"""Which images a step sees, and how they are augmented: functions of (seed, step) alone, on any number of ranks."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.augment.views import WeakPolicy, draw_weak, shift_whole
from shared.cli import UserError
from shared.data.images import ImageSet
from shared.data.pool import Pool
from shared.distributed import World
from shared.training.randomness import numpy_rng, torch_rng


@dataclass(frozen=True)
class Batch:
    """One rank's part of the global batch of a step, on its device.

    images: float32 [n, C, H, W] in [0, 1]. labels: int64 [n]. items: int64 [n] on the host, positions in the data set.
    part: which places of the global batch these are. count: images in the global batch.
    """

    images: Tensor
    labels: Tensor
    items: np.ndarray
    part: slice
    count: int

    @property
    def share(self) -> float:
        """Return this rank's share of the global batch: a loss that is a mean over n counts with it."""
        return len(self.items) / self.count

    def noise(self, seed: int, step: int, purpose: str) -> Tensor:
        """Return this rank's part of standard normal noise for the global batch, of the images' shape."""
        device = self.images.device
        whole = torch.randn(self.count, *self.images.shape[1:], generator=torch_rng(seed, step, purpose, device),
                            device=device)
        return whole[self.part]


    def slice(self, start: int, stop: int) -> Batch:
        """Return a part of these images, places counted from the first of them."""
        places = slice(self.part.start + start, min(self.part.start + stop, self.part.stop))
        return Batch(self.images[start:stop], self.labels[start:stop], self.items[start:stop], places, self.count)


def share_out(count: int, world: World) -> slice:
    """Return this rank's contiguous part of `count` items; sizes differ by one at most."""
    return slice(count * world.rank // world.size, count * (world.rank + 1) // world.size)


class TrainBatches:
    """Batches of a data set in a new random order each epoch, the last one of an epoch being shorter.

    size: images in the global batch. flip: mirror half of them. pad: crop from the image padded by so many black
    pixels (0: do not).
    """

    def __init__(self, images: ImageSet, size: int, world: World, seed: int, flip: bool = True, pad: int = 4) -> None:
        if size < world.size:
            raise UserError(f"a batch of {size} cannot be shared by {world.size} processes")
        if len(images) % size and len(images) % size < world.size:
            raise UserError(f"{len(images)} images in batches of {size} leave {len(images) % size} for the last one, "
                            f"fewer than the {world.size} processes; choose another batch size")
        self.pool, self.world, self.seed = Pool(images, (0.0,), (1.0,), world.device), world, seed
        self.count, self.size, self.shape = len(images), size, images.size
        self.policy = WeakPolicy(flip=flip, pad=pad, pad_mode="zero")
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def per_epoch(self) -> int:
        return -(-self.count // self.size)

    def items(self, step: int) -> np.ndarray:
        """Return the positions of the global batch of `step`, which lies in epoch step // per_epoch."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, numpy_rng(self.seed, epoch, "order").permutation(self.count)
        return self._order[1][place * self.size:(place + 1) * self.size]

    def __call__(self, step: int) -> Batch:
        """Return this rank's part of the batch of `step`."""
        return self._rows(step, share_out(len(self.items(step)), self.world))

    def mirrored(self, step: int) -> Batch:
        """Return the images at the mirrored places of the global batch: the last one for the first, and so on.

        Its part runs backwards.
        """
        count = len(self.items(step))
        part = share_out(count, self.world)
        first, stop = count - 1 - part.start, count - 1 - part.stop
        return self._rows(step, slice(first, stop if stop >= 0 else None, -1))

    def _rows(self, step: int, part: slice) -> Batch:
        items = self.items(step)
        draws = draw_weak(len(items), numpy_rng(self.seed, step, "augment"), self.shape, self.policy)
        chosen = items[part]
        images = self.pool.take(chosen)
        if self.policy.flip or self.policy.pad:
            images = shift_whole(images, draws[part])
        labels = self.pool.labels[torch.from_numpy(chosen.copy()).to(self.pool.device)]
        return Batch(images.float().div_(255), labels, chosen, part, len(items))


class TestItems:
    """A data set in its own order, as it is, shared out among ranks; every item exactly once."""

    __test__ = False  # no test class

    def __init__(self, images: ImageSet, size: int, world: World, seed: int) -> None:
        self.pool, self.size, self.world, self.seed = Pool(images, (0.0,), (1.0,), world.device), size, world, seed
        self.part = share_out(len(images), world)
        self.starts = range(self.part.start, self.part.stop, size)

    def __len__(self) -> int:
        """Return the number of items of all ranks."""
        return len(self.pool)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's items in batches of at most `size`."""
        for start in self.starts:
            items = np.arange(start, min(start + self.size, self.part.stop))
            images = self.pool.take(items).float().div_(255)
            labels = self.pool.labels[torch.from_numpy(items).to(self.pool.device)]
            yield Batch(images, labels, items, slice(items[0], items[-1] + 1), len(self.pool))

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        """Return standard normal noise for the batch's images: a function of (seed, item, purpose) alone."""
        return item_noise(self.seed, batch.items, batch.images.shape[1:], purpose).to(batch.images.device)


def item_noise(seed: int, items: np.ndarray, shape: tuple[int, ...] | torch.Size, purpose: str) -> Tensor:
    """Return standard normal noise [len(items), *shape] on the host, row i from (seed, items[i], purpose)."""
    return torch.stack([torch.randn(*shape, generator=torch_rng(seed, int(item), purpose)) for item in items])
