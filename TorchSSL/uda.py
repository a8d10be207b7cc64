"""UDA: the strong view shall have the sharpened prediction of the weak view, where that is confident.

Xie et al., "Unsupervised Data Augmentation for Consistency Training", NeurIPS 2020 (arXiv 1904.12848).

    python uda.py --c config/uda/uda_cifar10_40_0.yaml
    python uda.py --c config/uda_flex/uda_flex_cifar10_40_0.yaml      # with the thresholds of FlexMatch
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import parse_bool, run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, joint_logits
from TorchSSL.core.options import POSITIVE, SHARE, TEMPERATURE, Flag, parse_options
from TorchSSL.core.pseudo_labels import ClassStatus, consistency, pseudo_label_metrics

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch
    from TorchSSL.core.setting import Setting

torch = lazy("torch")

FLAGS = (
    Flag("--ulb_loss_ratio", POSITIVE, 1.0, "weight of the loss on unlabelled images"),
    Flag("--p_cutoff", SHARE, 0.8, "least confidence of a prediction to learn from"),
    Flag("--T", TEMPERATURE, 0.4, "temperature of the prediction to learn from"),
    Flag("--TSA_schedule", ("none", "linear", "exp", "log"), "none", "training signal annealing: how the confidence "
         "rises beyond which a labelled image is not learned any more"),
    Flag("--use_flex", parse_bool, False, "thresholds of FlexMatch, with p_cutoff for the class learned best"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("uda", __doc__, FLAGS, argv, also="uda_flex", amp=True, seed=0)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, UDA)


class UDA(Algorithm):
    """Loss of UDA, and with `use_flex` the state of FlexMatch."""

    views = ("weak", "strong")
    state = ("status",)

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        super().__init__(options, setting)
        self.status = ClassStatus(setting)

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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


def annealed(schedule: str, share: float, num_classes: int) -> float:
    """Return the confidence beyond which labelled images are not learned, after `share` of the training; 1: all are."""
    if schedule == "none":
        return 1.0
    alpha = {"linear": share, "exp": math.exp(5 * (share - 1)), "log": 1 - math.exp(-5 * share)}[schedule]
    return alpha * (1 - 1 / num_classes) + 1 / num_classes


def annealed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor,
                           limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of images predicted with no more confidence than `limit`, as a mean over all images
    [], and which they are [n]."""
    mask = (logits.detach().softmax(1).max(1).values <= limit).to(logits.dtype)
    return consistency(logits, labels, mask), mask


if __name__ == "__main__":
    run_main(main)
