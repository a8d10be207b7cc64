"""DASO's semantic pseudo-labels for learners other than FixMatch: the queue, and the blending with their own guesses.

Oh, Kim and Kweon, CVPR 2022 (arXiv 2106.05682), sections 3.2 and 3.3.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from DASO.lib.algorithm.daso import Blender
from DASO.lib.algorithm.feature_queue import FeatureQueue
from DASO.lib.algorithm.interface import Setting
from DASO.lib.config.config import Config


class Semantics:
    """State: `queue`, recent features of the labelled images, and `blender`, the shares of recent pseudo-labels."""

    def __init__(self, cfg: Config, setting: Setting) -> None:
        self.options, self.setting = cfg.ALGORITHM.DASO, setting
        self.queue = FeatureQueue(setting.num_classes, cfg.MODEL.QUEUE.MAX_SIZE, setting.feature_size, setting.device)
        self.blender = Blender(cfg, setting)

    def push(self, features: Tensor, labels: Tensor) -> None:
        """Store the teacher's features [B_l, D] of this rank's labelled images."""
        self.queue.push(self.setting.gather(features.float()), self.setting.gather(labels))

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probabilities [n, K] of the similarity classifier (equation 2)."""
        return (self.queue.similarity(features) / self.options.PROTO_TEMP).softmax(1)

    @torch.no_grad()
    def blend(self, target: Tensor, features: Tensor, it: int,
              distribution_aware: bool | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return guesses [n, K] blended with the semantic ones of features [n, D], and the labels of all three kinds.

        Before ALGORITHM.DASO.PRETRAIN_STEPS the guesses stay as they are. distribution_aware: in place of
        ALGORITHM.DASO.WITH_DIST_AWARE.
        """
        linear = target.argmax(1)
        semantic = torch.full_like(linear, -1)
        if it >= self.options.PRETRAIN_STEPS:
            aware = self.options.WITH_DIST_AWARE if distribution_aware is None else distribution_aware
            probabilities = self.probabilities(features)
            semantic, target = probabilities.argmax(1), self.blender(target, probabilities, aware)
        label = target.argmax(1)
        self.blender.note(label, it)
        return target, {"main": label, "linear": linear, "semantic": semantic}

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue.state_dict(), "blender": self.blender.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue.load_state_dict(state["queue"])
        self.blender.load_state_dict(state["blender"])
