"""Recent features of every class, and their means: the prototypes of a similarity classifier."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-8  # of a cosine, so that a prototype of zeros resembles nothing


class FeatureQueue:
    """First in, first out, a class: one ring of memory for all, without a loop over classes.

    capacity: features a class, one number or K of them. Attributes: `features` float32 [K, largest capacity, D];
    `pushed` int64 [K], how many ever came; `prototypes` float32 [K, D], mean of what is stored, zeros for a class that
    was not seen yet.
    """

    def __init__(self, num_classes: int, capacity: int | Sequence[int], feature_size: int,
                 device: torch.device | str = "cpu") -> None:
        each = [capacity] * num_classes if isinstance(capacity, int) else list(capacity)
        self.capacity = torch.tensor(each, device=device).clamp(min=1)
        self.largest = max(1, *each)
        self.features = torch.zeros(num_classes, self.largest, feature_size, device=device)
        self.pushed = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.prototypes = torch.zeros(num_classes, feature_size, device=device)
        # One row behind the ring takes what is not kept, so that shapes do not depend on the data.
        self._discard = num_classes * self.largest

    @property
    def sizes(self) -> Tensor:
        """How many features of each class are stored, int64 [K]."""
        return torch.minimum(self.pushed, self.capacity)

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> Tensor:
        """Store features [n, D] of classes int64 [n], in order, of the global batch; return the new prototypes [K, D].
        """
        classes = F.one_hot(labels, len(self.pushed))
        counts = classes.sum(0)
        rank = classes.cumsum(0).gather(1, labels[:, None])[:, 0] - 1  # among this batch's images of its class
        kept = rank >= (counts - self.capacity)[labels]  # of more than fit, the last ones
        slot = (self.pushed[labels] + rank) % self.capacity[labels]
        place = torch.where(kept, labels * self.largest + slot, self._discard)
        flat = self.features.view(-1, self.features.shape[2])
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
        flat[place] = features.to(flat.dtype)
        self.features = flat[:-1].view_as(self.features)
        self.pushed = self.pushed + counts
        mean = self.features.sum(1) / self.sizes.clamp(min=1)[:, None]
        self.prototypes = torch.where((counts > 0)[:, None], mean, self.prototypes)
        return self.prototypes

    def similarity(self, features: Tensor) -> Tensor:
        """Return the cosine of features [n, D] with every prototype: float [n, K] in -1..1."""
        unit = features.float() / features.float().norm(dim=1, keepdim=True).clamp(min=EPSILON)
        prototypes = self.prototypes / self.prototypes.norm(dim=1, keepdim=True).clamp(min=EPSILON)
        # Temperatures of 0.05 need more digits than the network's bfloat16 has.
        with torch.autocast(unit.device.type, enabled=False):
            return unit @ prototypes.T

    def state_dict(self) -> dict[str, Tensor]:
        return {"features": self.features, "pushed": self.pushed, "prototypes": self.prototypes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("features", "pushed", "prototypes"):
            setattr(self, name, state[name].to(self.features.device))
