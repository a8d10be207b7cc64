"""Training and testing of linear heads on frozen features, the same for a U-Net's blocks and a DiT's."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from DDAE.heads import LinearHeads, cosine_rate, heads_loss
from shared import distributed
from shared.distributed import World
from shared.run import Run

# step -> (features by key [n, dim], labels int64 [n], this rank's share of the global batch)
Examples = Callable[[int], tuple[Mapping[str, Tensor], Tensor, float]]


def train_heads(run: Run, heads: LinearHeads, optimizer: torch.optim.Optimizer, examples: Examples, epochs: int,
                per_epoch: int, lr: float) -> None:
    """Train all heads at once, each as if it were alone: Adam on its own cross-entropy, a cosine step per epoch."""
    world = run.world
    model = distributed.data_parallel(heads, world)
    for step in run.steps(epochs * per_epoch):
        optimizer.param_groups[0]["lr"] = cosine_rate(step // per_epoch, lr, epochs)
        features, labels, share = examples(step)
        loss = heads_loss(model(features), labels)
        optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over ranks, whose parts of the batch may differ in size.
        (loss * (share * world.size)).backward()
        optimizer.step()
        run.log(loss=loss.detach() / len(heads.keys))


@torch.no_grad()
def test_heads(heads: LinearHeads, examples: Iterable[tuple[Mapping[str, Tensor], Tensor]], world: World
               ) -> dict[str, float]:
    """Return the accuracy of each head in percent, over the items of all ranks, each counted once.

    examples: (features by key [n, dim] or, for several draws of the noise whose logits are averaged, [draws, n, dim];
    labels int64 [n]).
    """
    counts = torch.zeros(len(heads.keys) + 1, dtype=torch.int64, device=world.device)
    for features, labels in examples:
        draws = next(iter(features.values())).ndim == 3
        flat = {key: value.flatten(0, 1) for key, value in features.items()} if draws else features
        logits = heads(flat).unflatten(1, (-1, len(labels))).mean(1)
        counts[:-1] += (logits.argmax(2) == labels).sum(1)
        counts[-1] += len(labels)
    *correct, total = distributed.sum_(counts, world).tolist()
    return {key: 100 * number / total for key, number in zip(heads.keys, correct, strict=True)}


test_heads.__test__ = False  # no test
