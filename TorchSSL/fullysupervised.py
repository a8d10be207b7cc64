"""Fully supervised: all training images with their labels, the upper bound; or the few labelled ones alone.

    python fullysupervised.py --c config/fullysupervised/fullysupervised_cifar10_40_0.yaml
    python fullysupervised.py --num_labels 40 --all_labels False        # the baseline: 40 labels, nothing else
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import Bool, Option, run_main
from TorchSSL.core.algorithm import Algorithm, Batch, classify
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--all_labels", Bool, True, "every training image is labelled, for any --num_labels (as published); False: "
           "only --num_labels of them"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    options = learner_options("fullysupervised", __doc__, FLAGS, argv, seed=0, num_labels=4000, uratio=1)
    if options.all_labels:
        options.num_labels = 0
    return options


class FullySupervised(Algorithm):
    """The loss of supervised learning."""

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of the labelled images, and the numbers to log."""
        supervised = F.cross_entropy(classify(net, batch.labeled), batch.labels)
        return supervised, {"train/sup_loss": supervised, "train/total_loss": supervised}


if __name__ == "__main__":
    run_main(lambda: train(parse(), FullySupervised))
