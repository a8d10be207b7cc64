"""UDA: the strong view learns the sharpened prediction of the weak view if that is confident.

Xie et al., "Unsupervised Data Augmentation for Consistency Training", NeurIPS 2020 (arXiv 1904.12848).

    python uda.py --c config/uda/uda_cifar10_40_0.yaml
    python uda.py --c config/uda_flex/uda_flex_cifar10_40_0.yaml      # with the thresholds of FlexMatch
"""
from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from shared.cli import Bool, Choice, Float, Option, run_main
from TorchSSL.core.algorithm import (
    Algorithm,
    Batch,
    ClassStatus,
    Setting,
    consistency,
    joint_logits,
    pseudo_label_metrics,
)
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--ulb_loss_ratio", Float(0), 1.0, "weight of the loss on unlabelled images"),
    Option("--p_cutoff", Float(0, 1), 0.8, "least confidence of a prediction to learn from"),
    Option("--T", Float(1e-3), 0.4, "temperature of the prediction to learn from"),
    Option("--TSA_schedule", Choice("none", "linear", "exp", "log"), "none", "training signal annealing: "
           "schedule of the confidence beyond which a labelled image is not learned"),
    Option("--use_flex", Bool, False, "thresholds of FlexMatch, with p_cutoff for the class learned best"),
)
parse = partial(learner_options, "uda", __doc__, FLAGS, also="uda_flex", amp=True, seed=0)


class UDA(Algorithm):
    """Loss of UDA, and with `use_flex` the state of FlexMatch."""

    views = ("weak", "strong")
    state = ("status",)

    def __init__(self, options: SimpleNamespace, setting: Setting) -> None:
        super().__init__(options, setting)
        self.status = ClassStatus(setting)

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        labeled, weak, strong = joint_logits(net, batch)
        limit = annealed(self.options.TSA_schedule, step / self.options.num_train_iter, self.setting.num_classes)
        supervised, _ = annealed_cross_entropy(labeled, batch.labels, limit)

        weak = weak.detach()
        confidence, label = weak.softmax(1).max(1)
        thresholds = torch.full_like(self.status.beta, self.options.p_cutoff)
        if self.options.use_flex:
            self.status.refresh()
            thresholds = self.status.thresholds(self.options.p_cutoff)
            self.status.remember(batch.index, label, confidence >= self.options.p_cutoff)
        mask = (confidence >= thresholds[label]).float()
        unsupervised = consistency(strong, (weak / self.options.T).softmax(1), mask)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth, thresholds)}


def annealed(schedule: str, fraction: float, num_classes: int) -> float:
    """Return the confidence, up to 1, beyond which labelled images are not learned after `fraction` of the training."""
    if schedule == "none":
        return 1.0
    alpha = {"linear": fraction, "exp": math.exp(5 * (fraction - 1)), "log": 1 - math.exp(-5 * fraction)}[schedule]
    return alpha * (1 - 1 / num_classes) + 1 / num_classes


def annealed_cross_entropy(logits: Tensor, labels: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy [] of images with a confidence up to `limit`, as a mean over all, and their mask [n]."""
    mask = (logits.detach().softmax(1).max(1).values <= limit).to(logits.dtype)
    return consistency(logits, labels, mask), mask


if __name__ == "__main__":
    run_main(lambda: train(parse(), UDA))
