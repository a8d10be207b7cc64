"""Training and testing of linear heads on frozen features, the same for a U-Net's blocks and a DiT's."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from DDAE.ddae.heads import LinearHeads, cosine_rate, heads_loss
from shared import distributed
from shared.distributed import World
from shared.training.checkpoint import write_checkpoint
from shared.training.files import atomic
from shared.training.hardware import computed_on
from shared.training.run import Run

# step -> (features by key [n, dim], labels int64 [n], this rank's share of the global batch)
Examples = Callable[[int], tuple[Mapping[str, Tensor], Tensor, float]]


def train_heads(run: Run, heads: LinearHeads, optimizer: torch.optim.Optimizer, examples: Examples, epochs: int,
                per_epoch: int, lr: float, steps: int | None = None) -> None:
    """Train all heads at once, each as if it were alone: Adam on its own cross-entropy, a cosine step per epoch.

    steps: end after so many of them; None: after all epochs."""
    world = run.world
    model = distributed.data_parallel(heads, world)
    for step in run.steps(min(epochs * per_epoch, steps or epochs * per_epoch)):
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
    """Return the share that each head classifies correctly of the items of all ranks, each counted once.

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
    return {key: number / total for key, number in zip(heads.keys, correct, strict=True)}


test_heads.__test__ = False  # no test


def write_result(run: Run, heads: LinearHeads, accuracies: Mapping[str, float], main_key: str, **facts: Any) -> None:
    """Write result.json and heads.pth: accuracies as shares by key, `main_key` being the one that was asked for."""
    best = max(accuracies, key=accuracies.get)
    with atomic(run.outdir / "result.json", "w") as file:
        json.dump({"accuracy": {"last": accuracies[main_key], "best_on_test": accuracies[best]}, "probe": main_key,
                   "best": best, "probes": dict(accuracies), "seed": run.config["seed"], "iterations": run.step,
                   "precision": run.config["precision"], "seconds": round(run.seconds, 1), **facts,
                   **computed_on(run.world.device), "config": run.config}, file, indent=1)
    write_checkpoint(run.outdir / "heads.pth", {
        key: {name: part.cpu().clone() for name, part in zip(("weight", "bias"), heads.head(key), strict=True)}
        for key in heads.keys})
