"""MixUp over labelled and unlabelled images together, as MixMatch and ReMixMatch do it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.lazy import lazy

if TYPE_CHECKING:
    from shared.distributed import World

np, torch = lazy("numpy"), lazy("torch")


def mixup(inputs: torch.Tensor, targets: torch.Tensor, beta: float,
          permutation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mix every input [n, ...] and target [n, C] with that of another image; also return the share it keeps.

    beta: a draw in 0..1; the larger of it and its complement is kept, so that an image stays nearer to itself.
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

    Group i of the first chunk is exchanged with group i of chunk i, so that each chunk, which batch norm sees by
    itself, holds labelled images. The exchange is its own inverse.
    """
    order = np.arange(chunks * size).reshape(chunks, size)
    offsets = group_offsets(size, chunks)
    for chunk in range(1, chunks):
        group = slice(offsets[chunk], offsets[chunk + 1])
        order[0, group], order[chunk, group] = order[chunk, group].copy(), order[0, group].copy()
    return order


@dataclass
class Mixed:
    """What the network says about the mixed images of this rank: logits and targets [n, C].

    labeled: 1 for images mixed from a labelled one, 0 for the others, [n]. rows: where each stands in the global batch,
    int64 [n]. size: a rank's labelled images on average.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    labeled: torch.Tensor
    rows: torch.Tensor
    size: int

    def means(self, each: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of `each` [n] over labelled and over unlabelled images of the global batch.

        Ranks hold them in different numbers, so sums are divided by the equal share of a rank.
        """
        labeled = (each * self.labeled).sum() / self.size
        return labeled, (each * (1 - self.labeled)).sum() / (len(each) - self.size)


def forward_mixed(classify: Callable[[torch.Tensor, int], torch.Tensor], world: World, inputs: list[torch.Tensor],
                  targets: list[torch.Tensor], beta: float, permutation: np.ndarray) -> Mixed:
    """Mix the images of all ranks with each other and classify them, in chunks as large as the labelled batch.

    classify: images and the number of their chunk -> logits [n, C]. inputs: this rank's labelled images, then views of
    unlabelled ones, whole multiples of them; targets: probabilities, alike. beta, permutation: as in mixup, of the
    global batch.
    """
    from shared.distributed import gather

    size = len(inputs[0])
    whole_inputs, whole_targets = (torch.cat([gather(part, world) for part in parts]) for parts in (inputs, targets))
    mixed_inputs, mixed_targets, _ = mixup(whole_inputs, whole_targets, beta,
                                           torch.from_numpy(permutation).to(whole_inputs.device))
    order = interleaved(len(whole_inputs) // (size * world.size), size * world.size)[:, world.slice(size * world.size)]
    rows = torch.from_numpy(order).to(whole_inputs.device)
    logits = torch.cat([classify(mixed_inputs[chunk], number) for number, chunk in enumerate(rows)])
    rows = rows.flatten()
    return Mixed(logits, mixed_targets[rows], (rows < size * world.size).float(), rows, size)
