"""Pi-model: two weak views of an image shall get the same prediction.

Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017 (arXiv 1610.02242).

    python pimodel.py --c config/pimodel/pimodel_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, classify, frozen_batchnorm, ramp_up, squared_difference
from TorchSSL.core.options import POSITIVE, SHARE, Flag, parse_options

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch

torch = lazy("torch")

FLAGS = (
    Flag("--ulb_loss_ratio", POSITIVE, 10.0, "weight of the loss on unlabelled images"),
    Flag("--unsup_warmup_pos", SHARE, 0.4, "share of the training in which that weight rises from 0"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("pimodel", __doc__, FLAGS, argv, seed=0, uratio=1, num_labels=4000, num_eval_iter=1000)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, PiModel)


class PiModel(Algorithm):
    """The loss of the Pi-model; it has no state."""

    views = ("weak", "weak")

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend and the numbers to log."""
        supervised = torch.nn.functional.cross_entropy(classify(net, batch.labeled), batch.labels)
        with frozen_batchnorm(net):
            first = classify(net, batch.views[0])
            with torch.no_grad():
                second = classify(net, batch.views[1]).softmax(1)
        unsupervised = squared_difference(first, second)

        ramp = ramp_up(step, self.options.unsup_warmup_pos, self.options.num_train_iter)
        total = supervised + self.options.ulb_loss_ratio * ramp * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total}


if __name__ == "__main__":
    run_main(main)
