"""Pseudo-Label: the confident predictions on unlabelled images are taken for their labels.

Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML Workshop
on Challenges in Representation Learning 2013.

    python pseudolabel.py --c config/pseudolabel/pseudolabel_cifar10_40_0.yaml
    python pseudolabel.py --c config/pseudolabel_flex/pseudolabel_flex_cifar10_40_0.yaml    # FlexMatch's thresholds
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import parse_bool, run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, classify, frozen_batchnorm, ramp_up
from TorchSSL.core.options import POSITIVE, SHARE, Flag, parse_options
from TorchSSL.core.pseudo_labels import ClassStatus, consistency, pseudo_label_metrics

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch
    from TorchSSL.core.setting import Setting

torch = lazy("torch")

FLAGS = (
    Flag("--ulb_loss_ratio", POSITIVE, 1.0, "weight of the loss on unlabelled images"),
    Flag("--p_cutoff", SHARE, 0.95, "least confidence of a pseudo-label"),
    Flag("--unsup_warmup_pos", SHARE, 0.4, "share of the training in which that weight rises from 0"),
    Flag("--use_flex", parse_bool, False, "thresholds of FlexMatch, with p_cutoff for the class learned best"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("pseudolabel", __doc__, FLAGS, argv, also="pseudolabel_flex", seed=0, uratio=1)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, PseudoLabel)


class PseudoLabel(Algorithm):
    """Loss of Pseudo-Label, and with `use_flex` the state of FlexMatch."""

    views = ("weak",)
    state = ("status",)

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        super().__init__(options, setting)
        self.status = ClassStatus(setting)

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend and the numbers to log."""
        supervised = torch.nn.functional.cross_entropy(classify(net, batch.labeled), batch.labels)
        with frozen_batchnorm(net):
            weak = classify(net, batch.views[0])

        confidence, label = weak.detach().softmax(1).max(1)
        thresholds = torch.full_like(self.status.beta, self.options.p_cutoff)
        if self.options.use_flex:
            self.status.refresh()
            thresholds = self.status.thresholds(self.options.p_cutoff)
            self.status.remember(batch.index, label, confidence >= self.options.p_cutoff)
        mask = (confidence >= thresholds[label]).float()
        unsupervised = consistency(weak, label, mask)

        ramp = ramp_up(step, self.options.unsup_warmup_pos, self.options.num_train_iter)
        total = supervised + self.options.ulb_loss_ratio * ramp * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth, thresholds)}


if __name__ == "__main__":
    run_main(main)
