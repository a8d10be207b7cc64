"""The moving average of a network, batch statistics included, as published."""
from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "ema_model."


class ModelEMA:
    """A copy whose parameters and floating-point buffers follow the network: ema <- d ema + (1 - d) net.

    The decay d grows with the steps: min(1 - 1 / (step + 1), decay), so step 0 copies. Counters of batches are copied.
    weight_decay: convolution and linear weights of the average shrink by (1 - lr * weight_decay) after each update.
    """

    def __init__(self, net: nn.Module, decay: float = 0.999, weight_decay: float = 0.0) -> None:
        self.module = copy.deepcopy(net).requires_grad_(False)
        self.limit, self.weight_decay = decay, weight_decay
        self.shrinking = [layer.weight for layer in self.module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]

    def decay(self, step: int) -> float:
        """Return the decay of update number `step`, from 0."""
        return min(1 - 1 / (step + 1), self.limit)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int, lr: float) -> None:
        ours, theirs = (split_tensors(part) for part in (self.module, net))
        torch._foreach_lerp_(ours[0], theirs[0], 1 - self.decay(step))
        if ours[1]:
            torch._foreach_copy_(ours[1], theirs[1])
        if self.weight_decay:
            torch._foreach_mul_(self.shrinking, 1 - lr * self.weight_decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {PREFIX + name: value for name, value in self.module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(as_counters(state))


def split_tensors(net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return (parameters and floating-point buffers, other buffers)."""
    buffers = list(net.buffers())
    return ([*net.parameters(), *(buffer for buffer in buffers if buffer.is_floating_point())],
            [buffer for buffer in buffers if not buffer.is_floating_point()])


def as_counters(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the average's prefix, batch counters as integers: published averages hold floats."""
    plain = {name.removeprefix(PREFIX): value for name, value in state.items()}
    return {name: value.round().long() if name.endswith("num_batches_tracked") else value
            for name, value in plain.items()}
