"""Images that batches are drawn from, on the device where they fit."""
from __future__ import annotations

import numpy as np
import torch

from shared.augment.randaugment import to_device
from shared.augment.views import normalise
from shared.data.images import ImageSet


class Pool:
    """uint8 images to draw batches from: on the device where they fit, else gathered on the host batch by batch.

    labels: int64 [N] on the device, -1 where unknown.
    """

    def __init__(self, images: ImageSet, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.host = images.images
        self.device = device
        self.labels = torch.from_numpy(np.ascontiguousarray(images.labels)).to(device)
        self.mean, self.std = mean, std
        self.resident = None
        if device.type != "cpu" and fits(self.host.nbytes, device):
            self.resident = torch.from_numpy(np.ascontiguousarray(self.host)).to(device)

    def __len__(self) -> int:
        return len(self.host)

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return uint8 [n, C, H, W] on the device; nothing waits for it."""
        if self.resident is not None:
            return self.resident[to_device(indices, self.device)]
        # A copy, so that read-only memory maps stay untouched. Sorted reads would be faster only from spinning disks.
        return to_device(self.host[indices], self.device)

    def normalised(self, indices: np.ndarray) -> torch.Tensor:
        """Return the images at `indices` as the evaluation sees them: float32 [n, C, H, W], normalised."""
        return normalise(self.take(indices), self.mean, self.std)


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes leave at least half of the device's free memory to the training."""
    if device.type != "cuda":
        return True
    return size < torch.cuda.mem_get_info(device)[0] / 2
