"""Optimiser and learning-rate schedule."""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch

from DASO.lib.config.config import Config
from shared.distributed import World, mean
from shared.training.checkpoint import keep_layout


def make_optimizer(parameters: list[torch.nn.Parameter], cfg: Config) -> torch.optim.Optimizer:
    """Return SGD or Adam over all parameters alike: weight decay also on batch norm and biases, as published."""
    solver, fused = cfg.SOLVER, not cfg.STRICT
    if solver.OPTIM_NAME == "Adam":
        optimizer = torch.optim.Adam(parameters, solver.BASE_LR, (solver.ADAM.BETA1, solver.ADAM.BETA2),
                                     solver.ADAM.EPS, solver.ADAM.WEIGHT_DECAY, fused=fused)
    else:
        optimizer = torch.optim.SGD(parameters, solver.BASE_LR, solver.SGD.MOMENTUM, nesterov=solver.SGD.NESTEROV,
                                    weight_decay=solver.SGD.WEIGHT_DECAY, fused=fused)
    optimizer.register_load_state_dict_post_hook(keep_layout)
    return optimizer


def learning_rate(cfg: Config, it: int, max_iter: int | None = None) -> float:
    """Return the rate of iteration `it` (from 0) by SOLVER.LR_SCHEDULER_NAME. max_iter: in place of SOLVER.MAX_ITER."""
    solver, warm = cfg.SOLVER, 1.0
    if it < solver.WARMUP_ITERS:
        warm = solver.WARMUP_FACTOR
        if solver.WARMUP_METHOD == "linear":
            fraction = it / solver.WARMUP_ITERS
            warm = solver.WARMUP_FACTOR * (1 - fraction) + fraction
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        return solver.BASE_LR * warm * solver.GAMMA ** bisect_right(sorted(solver.STEPS), it)
    total = max_iter or solver.MAX_ITER
    return solver.BASE_LR * warm * math.cos(solver.COS_LR_RATIO * math.pi * it / (16 * total))


class Scheduler:
    """Sets the rate of each iteration. Without SOLVER.APPLY_SCHEDULER the rate of the first one stays, as published.

    max_iter: length of the cosine, in place of SOLVER.MAX_ITER.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, cfg: Config, max_iter: int | None = None) -> None:
        self.optimizer, self.cfg, self.max_iter = optimizer, cfg, max_iter
        self._set(0)

    @property
    def lr(self) -> float:
        """The rate in force."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self) -> None:
        """Go on to the next iteration."""
        self._set(self.iteration + 1)

    def _set(self, iteration: int) -> None:
        self.iteration = iteration if self.cfg.SOLVER.APPLY_SCHEDULER else 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.iteration, self.max_iter)

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._set(int(state["last_epoch"]))


@torch.no_grad()
def average_gradients(parameters: list[torch.nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over ranks, in one message.

    In place of DistributedDataParallel, since a learner may use parts of its network in any order and number.
    """
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = mean(torch.cat([gradient.flatten() for gradient in gradients]), world)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])
