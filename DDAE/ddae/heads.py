"""What is trained on frozen features: linear heads, many at once, and a head that is told the noise level."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from DDAE.ddae.blocks import TimeEmbedding
from shared.training.randomness import torch_rng


class LinearHeads(nn.Module):
    """Independent linear classifiers, one per key, trained as few batched matrix products.

    dims: key -> feature dimension. Heads of equal dimension lie in one tensor. A head's initial weights depend on
    (seed, key) alone, so that it is the same alone and among others; they are distributed as PyTorch's Linear.
    """

    def __init__(self, dims: Mapping[str, int], classes: int, seed: int = 0) -> None:
        super().__init__()
        self.groups: dict[int, list[str]] = {}
        for key, dim in dims.items():
            self.groups.setdefault(dim, []).append(key)
        self.keys = [key for group in self.groups.values() for key in group]
        self.weight, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for dim, keys in self.groups.items():
            weight, bias = torch.empty(len(keys), classes, dim), torch.empty(len(keys), 1, classes)
            for place, key in enumerate(keys):
                rng, bound = torch_rng(seed, 0, f"linear head {key}"), 1 / math.sqrt(dim)
                weight[place].uniform_(-bound, bound, generator=rng)
                bias[place].uniform_(-bound, bound, generator=rng)
            self.weight[str(dim)], self.bias[str(dim)] = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of all heads, [heads, N, classes], in the order of `keys`; features: key -> [N, dim]."""
        return torch.cat([
            torch.baddbmm(self.bias[str(dim)], torch.stack([features[key].float() for key in keys]),
                          self.weight[str(dim)].mT)
            for dim, keys in self.groups.items()])

    def head(self, key: str) -> tuple[Tensor, Tensor]:
        """Return (weight [classes, dim], bias [classes]) of one head: views, which may be written to."""
        for dim, keys in self.groups.items():
            if key in keys:
                place = keys.index(key)
                return self.weight[str(dim)].data[place], self.bias[str(dim)].data[place, 0]
        raise KeyError(key)


class NoiseHead(nn.Module):
    """Two layers on features of a noisy image, told its noise level: ([N, dim], t [N]) -> logits [N, num_classes].

    t: index of the level as an integer, not scaled; its embedding is added to the features. dim: a multiple of 8, at
    least 16.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.time_emb = TimeEmbedding(dim)
        self.cls = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, num_classes))

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        return self.cls(features + self.time_emb(t))


def heads_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over heads, so that each gets the gradient of its own mean over N.

    logits: [heads, N, classes]; labels: int64 [N].
    """
    heads, count, classes = logits.shape
    losses = F.cross_entropy(logits.reshape(-1, classes), labels.repeat(heads), reduction="none")
    return losses.view(heads, count).mean(1).sum()


def cosine_rate(epoch: int, lr: float, epochs: int) -> float:
    """Return the learning rate of an epoch (from 0): lr (1 + cos(pi epoch / epochs)) / 2."""
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))


def formatted(values: Sequence[float]) -> list[str]:
    """Return the numbers with four decimals, as the contrastive metrics are printed."""
    return [f"{value:.4f}" for value in values]
