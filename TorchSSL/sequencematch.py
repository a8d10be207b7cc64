"""SequenceMatch: a medium view between the weak and the strong one, and a use for predictions without confidence.

Nguyen, "SequenceMatch: Revisiting the design of weak-strong augmentations for semi-supervised learning", WACV 2024.

    python sequencematch.py --dataset cifar10 --num_labels 40 --save_name sequencematch_cifar10_40_0

A confident prediction on the weak view is the label of the other two, as in FixMatch. Where it is not confident, the
predictions along the sequence weak, medium, strong are drawn together pair by pair, so that every image teaches
something in every step. The method is that of the paper; the weights and what its medium view consists of (here one
operation of RandAugment, no cutout) were not to be had and are ours.
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
    Flag("--ulb_loss_ratio", POSITIVE, 1.0, "weight of the loss on confident unlabelled images"),
    Flag("--kl_loss_ratio", POSITIVE, 1.0, "weight of the divergence between the views of the others"),
    Flag("--p_cutoff", SHARE, 0.95, "least confidence of a pseudo-label"),
    Flag("--hard_label", parse_bool, True, "learn the most likely class; False: the softened probabilities"),
    Flag("--T", TEMPERATURE, 0.5, "temperature of soft labels and of what the divergences aim at"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("sequencematch", __doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, SequenceMatch)


class SequenceMatch(Algorithm):
    """The loss of SequenceMatch; it has no state."""

    views = ("weak", "medium", "strong")

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend and the numbers to log."""
        labeled, weak, medium, strong = joint_logits(net, batch)
        supervised = torch.nn.functional.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        confidence, label = weak.softmax(1).max(1)
        mask = (confidence >= self.options.p_cutoff).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(medium, target, mask) + consistency(strong, target, mask)

        pairs = ((weak, medium), (medium, strong), (weak, strong))  # (what leads, what follows)
        divergence = sum(self.divergence(leader, follower, 1 - mask) for leader, follower in pairs)

        total = supervised + self.options.ulb_loss_ratio * unsupervised + self.options.kl_loss_ratio * divergence
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised,
                       "train/divergence_loss": divergence, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth)}

    def divergence(self, leader: torch.Tensor, follower: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the masked mean KL(sharpened leader || follower) of logits [n, C]; its gradient moves the follower."""
        target = (leader.detach() / self.options.T).softmax(1)
        each = torch.nn.functional.kl_div(follower.log_softmax(1), target, reduction="none").sum(1)
        return (mask * each).mean()


if __name__ == "__main__":
    run_main(main)
