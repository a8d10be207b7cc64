"""A queue of labelled features for every class, and their means: the prototypes that images are compared with."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from DASO.lib.algorithm.interface import Setting


class FeatureQueue:
    """Keeps the last features of every class, of all ranks, oldest going first.

    capacity: features a class, one number or one for each. `features` [K, largest capacity + 1, D], rows at falling
    age in a ring (the last row takes what is not to be kept); `pushed` int64 [K], how many there ever were;
    `prototypes` [K, D], the means of those kept, zero for a class that was never seen.
    """

    def __init__(self, capacity: int | Sequence[int], setting: Setting) -> None:
        classes, device = setting.num_classes, setting.device
        sizes = [capacity] * classes if isinstance(capacity, int) else list(capacity)
        self.setting, self.capacity = setting, torch.tensor(sizes, device=device)
        self.features = torch.zeros(classes, max(sizes) + 1, setting.feature_size, device=device)
        self.pushed = torch.zeros(classes, dtype=torch.int64, device=device)
        self.prototypes = torch.zeros(classes, setting.feature_size, device=device)

    @property
    def sizes(self) -> Tensor:
        """How many features each class holds, int64 [K]."""
        return torch.minimum(self.pushed, self.capacity)

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> None:
        """Append this rank's features [n, D] of images labelled int64 [n], and refresh the prototypes."""
        features = self.setting.gather(features.to(self.features.dtype))
        labels = self.setting.gather(labels)
        member = torch.nn.functional.one_hot(labels, len(self.capacity))
        arrived, earlier = member.sum(0), (member.cumsum(0) * member).sum(1) - 1
        capacity = self.capacity[labels]
        kept = earlier >= arrived[labels] - capacity  # of more than a class can hold, the last ones
        place = torch.where(kept, (self.pushed[labels] + earlier) % capacity, self.features.shape[1] - 1)
        self.features[labels, place] = features
        self.pushed = self.pushed + arrived
        filled = torch.arange(self.features.shape[1], device=labels.device) < self.sizes[:, None]
        means = (self.features * filled[:, :, None]).sum(1) / self.sizes.clamp(min=1)[:, None]
        self.prototypes = torch.where(arrived[:, None] > 0, means, self.prototypes)

    def state_dict(self) -> dict[str, Tensor]:
        return {"features": self.features[:, :-1], "pushed": self.pushed, "prototypes": self.prototypes}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.features[:, :-1].copy_(state["features"])
        self.pushed, self.prototypes = (state[name].to(self.setting.device) for name in ("pushed", "prototypes"))
