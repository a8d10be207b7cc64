"""The order in which training images are seen: an endless shuffle within a moving window."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch


class InfiniteOrder:
    """The published data order, one endless sequence of indices into a training set.

    The items are shuffled once, then read cyclically; after each reading the item changes places with one read fewer
    than `window` x size positions before, so that passes differ. The sequence is a function of (size, seed) alone:
    position n is image n of the run whatever the number of processes, of which rank r takes those with n mod W = r.

    size: number of items; seed: of NumPy's legacy generator; window: share of the set, 0 repeats one permutation.
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

        Reading on from the last call, or one of the last two readings again, is cheap. Going back otherwise starts
        over from position 0, and what lies between is passed through at about five million positions a second.
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

    # The state spares a resumed run the way from position 0; it adds nothing that could not be computed again.

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
