"""FlexMatch: FixMatch with a threshold for every class, lower where little has been learned so far.

Zhang et al., "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling", NeurIPS 2021
(arXiv 2110.08263).

    python flexmatch.py --c config/flexmatch/flexmatch_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import parse_bool, run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, joint_logits
from TorchSSL.core.options import POSITIVE, SHARE, TEMPERATURE, Flag, parse_options
from TorchSSL.core.pseudo_labels import ClassStatus, DistributionAlignment, consistency, pseudo_label_metrics

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch
    from TorchSSL.core.setting import Setting

torch = lazy("torch")

FLAGS = (
    Flag("--ulb_loss_ratio", POSITIVE, 1.0, "weight of the loss on unlabelled images"),
    Flag("--p_cutoff", SHARE, 0.95, "threshold of a class that has been learned best"),
    Flag("--hard_label", parse_bool, True, "learn the most likely class; False: the softened probabilities"),
    Flag("--T", TEMPERATURE, 0.5, "temperature of soft labels"),
    Flag("--use_DA", parse_bool, False, "align the predictions with the class shares of the labelled images"),
    Flag("--thresh_warmup -w", parse_bool, True, "count images without a pseudo-label as one class more"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("flexmatch", __doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, FlexMatch)


class FlexMatch(Algorithm):
    """State and loss of FlexMatch. `status`: the last confident pseudo-label of every unlabelled image."""

    views = ("weak", "strong")
    state = ("status", "alignment")

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        super().__init__(options, setting)
        self.status, self.alignment = ClassStatus(setting, options.thresh_warmup), DistributionAlignment(setting)

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend and the numbers to log."""
        self.status.refresh()
        labeled, weak, strong = joint_logits(net, batch)
        supervised = torch.nn.functional.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        probabilities = weak.softmax(1)
        if self.options.use_DA:
            probabilities = self.alignment(probabilities)
        confidence, label = probabilities.max(1)
        thresholds = self.status.thresholds(self.options.p_cutoff)
        mask = (confidence >= thresholds[label]).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(strong, target, mask)
        # What counts as learned is measured by the fixed threshold.
        self.status.remember(batch.index, label, confidence >= self.options.p_cutoff)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth, thresholds)}


if __name__ == "__main__":
    run_main(main)
