"""ReMixMatch: MixMatch whose guesses come from the weak view, aligned, and are learned on strong views; with rotations.

Berthelot et al., "ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring", ICLR
2020 (arXiv 1911.09785).

    python remixmatch.py --c config/remixmatch/remixmatch_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import parse_bool, run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, classify, frozen_batchnorm, ramp_up
from TorchSSL.core.mixing import draw_mixing, forward_mixed
from TorchSSL.core.options import POSITIVE, SHARE, TEMPERATURE, Flag, parse_options
from TorchSSL.core.pseudo_labels import DistributionAlignment, sharpen

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch
    from TorchSSL.core.setting import Setting

torch = lazy("torch")

FLAGS = (
    Flag("--w_match", POSITIVE, 1.5, "weight of the loss on mixed unlabelled images"),
    Flag("--w_kl", POSITIVE, 0.5, "weight of the loss on the first strong view, unmixed"),
    Flag("--w_rot", POSITIVE, 0.5, "weight of the loss of telling quarter turns"),
    Flag("--warm_up", SHARE, 1 / 64, "share of the training in which the first two weights rise from 0"),
    Flag("--alpha", TEMPERATURE, 0.75, "both parameters of the beta distribution of mixing shares"),
    Flag("--T", TEMPERATURE, 0.5, "temperature that sharpens the guessed labels"),
    Flag("--ulb_loss_ratio", POSITIVE, 1.0, "accepted, not used: the weights are those above"),
    Flag("--use_dm", parse_bool, True, "accepted, not used: predictions are always aligned"),
    Flag("--use_xe", parse_bool, True, "accepted, not used: the loss is always a cross-entropy"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("remixmatch", __doc__, FLAGS, argv, amp=True, seed=0, uratio=1, num_labels=4000,
                         num_eval_iter=1000)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, ReMixMatch)


class ReMixMatch(Algorithm):
    """State and loss of ReMixMatch. `alignment`: the average prediction on unlabelled images."""

    views = ("weak", "strong", "strong", "rotated")
    state = ("alignment",)
    rotation_head = True

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        super().__init__(options, setting)
        self.alignment = DistributionAlignment(setting)

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend (equation 6) and the numbers to log."""
        options, cross_entropy = self.options, torch.nn.functional.cross_entropy
        weak, strong, second_strong, rotated = batch.views
        one_hot = torch.nn.functional.one_hot(batch.labels, self.setting.num_classes).float()
        guess = self.guess(net, weak)
        inputs = [batch.labeled, strong, second_strong, weak]
        share, permutation = draw_mixing(self.setting, options.alpha, inputs, step)
        mixed = forward_mixed(net, self.setting, inputs, [one_hot, guess, guess, guess], share, permutation)
        supervised, unsupervised = mixed.means(cross_entropy(mixed.logits, mixed.targets, reduction="none"))

        with frozen_batchnorm(net):
            unmixed = cross_entropy(classify(net, strong), guess)
            rotation = cross_entropy(net(rotated)[1].float(), batch.turns)

        ramp = ramp_up(step, options.warm_up, options.num_train_iter)
        total = (supervised + options.w_rot * rotation + options.w_kl * ramp * unmixed
                 + options.w_match * ramp * unsupervised)
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/kl_loss": unmixed,
                       "train/rot_loss": rotation, "train/total_loss": total}

    def guess(self, net: torch.nn.Module, weak: torch.Tensor) -> torch.Tensor:
        """Return the labels guessed from the weak views [n, C]: aligned with the labelled class shares, sharpened."""
        with torch.no_grad(), frozen_batchnorm(net):
            probabilities = classify(net, weak).softmax(1)
        return sharpen(self.alignment(probabilities), self.options.T)


if __name__ == "__main__":
    run_main(main)
