"""Mean Teacher: the prediction shall be that of a teacher, whose weights are the moving average of the student's.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017 (arXiv 1703.01780).

    python meanteacher.py --c config/meanteacher/meanteacher_cifar10_40_0.yaml
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
    Flag("--ulb_loss_ratio", POSITIVE, 50.0, "weight of the loss on unlabelled images"),
    Flag("--unsup_warm_up", SHARE, 0.4, "share of the training in which that weight rises from 0"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("meanteacher", __doc__, FLAGS, argv, save_name="meanTeacher", amp=True, seed=0, uratio=1,
                         num_labels=4000, num_eval_iter=1000)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, MeanTeacher)


class MeanTeacher(Algorithm):
    """The loss of Mean Teacher. Its teacher is the average of weights that the trainer keeps anyway."""

    views = ("weak", "weak")

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend and the numbers to log."""
        supervised = torch.nn.functional.cross_entropy(classify(net, batch.labeled), batch.labels)
        with torch.no_grad(), frozen_batchnorm(self.teacher):
            target = classify(self.teacher, batch.views[0]).softmax(1)
        with frozen_batchnorm(net):
            student = classify(net, batch.views[1])
        unsupervised = squared_difference(student, target)

        ramp = ramp_up(step, self.options.unsup_warm_up, self.options.num_train_iter)
        total = supervised + self.options.ulb_loss_ratio * ramp * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total}


if __name__ == "__main__":
    run_main(main)
