"""DeFixMatch: FixMatch without its bias, by taking off what the same loss says on the labelled images.

Schmutz, Humbert and Mattei, "Don't fear the unlabelled: safe semi-supervised learning via debiasing", ICLR 2023
(arXiv 2203.07512).

    python defixmatch.py --dataset cifar10 --num_labels 40 --save_name defixmatch_cifar10_40_0

The loss on unlabelled images pulls the risk away from the true one. Its expectation on labelled images is the same, so
subtracting it there (a control variate) leaves an unbiased estimate of the supervised risk, for any weight. What is
subtracted is the loss of strong views, which grows without bound when it is made worse. So the supervised loss is the
mean over a weak and a strong view: at weights up to 1/2 it outweighs the correction where label and pseudo-label agree.
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
    Flag("--ulb_loss_ratio", POSITIVE, 0.5, "weight of the loss on unlabelled images, and of its correction; above 0.5 "
         "the sum has no lower bound"),
    Flag("--p_cutoff", SHARE, 0.95, "least confidence of a pseudo-label"),
    Flag("--hard_label", parse_bool, True, "learn the most likely class; False: the softened probabilities"),
    Flag("--T", TEMPERATURE, 0.5, "temperature of soft labels"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("defixmatch", __doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, DeFixMatch)


class DeFixMatch(Algorithm):
    """The loss of DeFixMatch; it has no state."""

    views = ("weak", "strong")
    labeled_views = ("strong",)

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend (equation 3) and the numbers to log."""
        labeled, weak, strong, labeled_strong = joint_logits(net, batch)
        supervised = (torch.nn.functional.cross_entropy(labeled, batch.labels)
                      + torch.nn.functional.cross_entropy(labeled_strong, batch.labels)) / 2
        unsupervised, mask, label = self.pseudo_label_loss(weak, strong)
        correction, _, _ = self.pseudo_label_loss(labeled, labeled_strong)  # as if their labels were unknown

        total = supervised + self.options.ulb_loss_ratio * (unsupervised - correction)
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised,
                       "train/correction_loss": correction, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth)}

    def pseudo_label_loss(self, weak: torch.Tensor,
                          strong: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return FixMatch's loss of strong-view logits [n, C] [], which images it kept [n] and their classes [n]."""
        weak = weak.detach()
        confidence, label = weak.softmax(1).max(1)
        mask = (confidence >= self.options.p_cutoff).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        return consistency(strong, target, mask), mask, label


if __name__ == "__main__":
    run_main(main)
