"""FixMatch: a confident prediction on the weak view is the label of the strong view.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020
(arXiv 2001.07685).

    python fixmatch.py --c config/fixmatch/fixmatch_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import parse_bool, run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, joint_logits
from TorchSSL.core.options import POSITIVE, SHARE, TEMPERATURE, Flag, parse_options
from TorchSSL.core.pseudo_labels import consistency, pseudo_label_metrics

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch

torch = lazy("torch")

FLAGS = (
    Flag("--ulb_loss_ratio", POSITIVE, 1.0, "weight of the loss on unlabelled images"),
    Flag("--p_cutoff", SHARE, 0.95, "least confidence of a pseudo-label"),
    Flag("--hard_label", parse_bool, True, "learn the most likely class; False: the softened probabilities"),
    Flag("--T", TEMPERATURE, 0.5, "temperature of soft labels"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("fixmatch", __doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, FixMatch)


class FixMatch(Algorithm):
    """The loss of FixMatch; it has no state."""

    views = ("weak", "strong")

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend (equations 3 and 4) and the numbers to log."""
        labeled, weak, strong = joint_logits(net, batch)
        supervised = torch.nn.functional.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        confidence, label = weak.softmax(1).max(1)
        mask = (confidence >= self.options.p_cutoff).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(strong, target, mask)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth)}


if __name__ == "__main__":
    run_main(main)
