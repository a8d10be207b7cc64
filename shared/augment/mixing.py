"""MixUp over labelled and unlabelled images together, as MixMatch and ReMixMatch do it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.distributed import World, gather
from shared.training.precision import to_device


def mixup(inputs: Tensor, targets: Tensor, beta: float, permutation: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mix every input [n, ...] and target [n, C] with that of another image; also return the fraction it keeps.

    beta: a draw in 0..1; the larger of it and its complement is kept, so an image stays nearer to itself.
    permutation: int64 [n]. Zhang et al. 2018 (arXiv 1710.09412), Berthelot et al. 2019 (arXiv 1905.02249), eq. 8-11.
    """
    kept = max(beta, 1 - beta)
    return (kept * inputs + (1 - kept) * inputs[permutation], kept * targets + (1 - kept) * targets[permutation], kept)


def group_offsets(size: int, groups: int) -> list[int]:
    """Return where each of `groups` groups begins in a chunk of `size`, and its end; the last ones take the rest."""
    small, rest = divmod(size, groups)
    sizes = [small + (group >= groups - rest) for group in range(groups)]
    return np.cumsum([0, *sizes]).tolist()


def interleaved(chunks: int, size: int) -> np.ndarray:
    """Return which row goes where, int64 [chunks, size], rows being numbered chunk after chunk.

    Batch norm sees each chunk by itself, so every chunk should hold labelled images: group i of the first chunk is
    exchanged with group i of chunk i. The exchange is its own inverse.
    """
    order = np.arange(chunks * size).reshape(chunks, size)
    offsets = group_offsets(size, chunks)
    for chunk in range(1, chunks):
        group = slice(offsets[chunk], offsets[chunk + 1])
        order[0, group], order[chunk, group] = order[chunk, group].copy(), order[0, group].copy()
    return order


@dataclass
class Mixed:
    """Predictions for the mixed images of this rank: logits and targets [n, C].

    labeled: 1 for images mixed from a labelled one, 0 for the others, [n]. rows: their positions in the global batch,
    int64 [n]. size: a rank's labelled images on average.
    """

    logits: Tensor
    targets: Tensor
    labeled: Tensor
    rows: Tensor
    size: int

    def means(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of `each` [n] over labelled and over unlabelled images of the global batch.

        Ranks hold them in different numbers, so sums are divided by the average number of a rank.
        """
        labeled = (each * self.labeled).sum() / self.size
        return labeled, (each * (1 - self.labeled)).sum() / (len(each) - self.size)


def forward_mixed(classify: Callable[[Tensor, int], Tensor], world: World, inputs: list[Tensor], targets: list[Tensor],
                  beta: float, permutation: np.ndarray) -> Mixed:
    """Mix the images of all ranks with each other and classify them, in chunks as large as the labelled batch.

    classify: images and the number of their chunk -> logits [n, C]. inputs: this rank's labelled images, then views of
    unlabelled ones, whole multiples of them; targets: probabilities, alike. beta, permutation: as in mixup, of the
    global batch.
    """
    size = len(inputs[0])
    all_inputs, all_targets = (torch.cat([gather(part, world) for part in parts]) for parts in (inputs, targets))
    mixed_inputs, mixed_targets, _ = mixup(all_inputs, all_targets, beta, to_device(permutation, all_inputs.device))
    order = interleaved(len(all_inputs) // (size * world.size), size * world.size)[:, world.slice(size * world.size)]
    rows = to_device(order, all_inputs.device)
    logits = torch.cat([classify(mixed_inputs[chunk], number) for number, chunk in enumerate(rows)])
    rows = rows.flatten()
    return Mixed(logits, mixed_targets[rows], (rows < size * world.size).float(), rows, size)
