"""Fully supervised: all training images with their labels, the upper bound; or the few labelled ones alone.

    python fullysupervised.py --c config/fullysupervised/fullysupervised_cifar10_40_0.yaml
    python fullysupervised.py --num_labels 40 --all_labels False        # the baseline: 40 labels, nothing else
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import parse_bool, run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, classify
from TorchSSL.core.options import Flag, parse_options

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch

torch = lazy("torch")

FLAGS = (
    Flag("--all_labels", parse_bool, True, "every training image is labelled, whatever --num_labels says (as "
         "published); False: only --num_labels of them"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    options = parse_options("fullysupervised", __doc__, FLAGS, argv, seed=0, num_labels=4000, uratio=1)
    if options.all_labels:
        options.num_labels = 0
    return options


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, FullySupervised)


class FullySupervised(Algorithm):
    """The loss of supervised learning."""

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the cross-entropy of the labelled images, and the numbers to log."""
        supervised = torch.nn.functional.cross_entropy(classify(net, batch.labeled), batch.labels)
        return supervised, {"train/sup_loss": supervised, "train/total_loss": supervised}


if __name__ == "__main__":
    run_main(main)
