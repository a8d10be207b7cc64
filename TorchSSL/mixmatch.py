"""MixMatch: guessed labels for unlabelled images, sharpened, and everything mixed with everything.

Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019 (arXiv 1905.02249).

    python mixmatch.py --c config/mixmatch/mixmatch_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, classify, frozen_batchnorm, ramp_up
from TorchSSL.core.mixing import draw_mixing, forward_mixed
from TorchSSL.core.options import POSITIVE, SHARE, TEMPERATURE, Flag, parse_options
from TorchSSL.core.pseudo_labels import sharpen

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch

torch = lazy("torch")

FLAGS = (
    Flag("--ulb_loss_ratio", POSITIVE, 100.0, "weight of the loss on unlabelled images"),
    Flag("--ramp_up", SHARE, 1 / 64, "share of the training in which that weight rises from 0"),
    Flag("--alpha", TEMPERATURE, 0.5, "both parameters of the beta distribution of mixing shares"),
    Flag("--T", TEMPERATURE, 0.5, "temperature that sharpens the guessed labels"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("mixmatch", __doc__, FLAGS, argv, amp=True, seed=0, uratio=1, num_labels=4000,
                         num_eval_iter=1000)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, MixMatch)


class MixMatch(Algorithm):
    """The loss of MixMatch; it has no state."""

    views = ("weak", "weak")

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend (equations 2 to 5) and the numbers to log."""
        options = self.options
        one_hot = torch.nn.functional.one_hot(batch.labels, self.setting.num_classes).float()
        guess = self.guess(net, batch)
        share, permutation = draw_mixing(self.setting, options.alpha, [batch.labeled, *batch.views], step)
        mixed = forward_mixed(net, self.setting, [batch.labeled, *batch.views], [one_hot, guess, guess], share,
                              permutation)

        supervised, _ = mixed.means(torch.nn.functional.cross_entropy(mixed.logits, mixed.targets, reduction="none"))
        _, unsupervised = mixed.means(((mixed.logits.softmax(1) - mixed.targets) ** 2).mean(1))

        ramp = ramp_up(step, options.ramp_up, options.num_train_iter)
        total = supervised + options.ulb_loss_ratio * ramp * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total}

    def guess(self, net: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the labels guessed for the unlabelled images [n, C]: the mean over both views, sharpened."""
        with torch.no_grad(), frozen_batchnorm(net):
            first, second = (classify(net, view).softmax(1) for view in batch.views)
        return sharpen((first + second) / 2, self.options.T)


if __name__ == "__main__":
    run_main(main)
