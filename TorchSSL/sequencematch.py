"""SequenceMatch: a medium view between the weak and the strong one, and a loss on unconfident predictions.

Nguyen, "SequenceMatch: Revisiting the design of weak-strong augmentations for semi-supervised learning", WACV 2024.

    python sequencematch.py --dataset cifar10 --num_labels 40 --save_name sequencematch_cifar10_40_0

A confident prediction on the weak view is the label of the other two, as in FixMatch. For the other images
the predictions along the sequence weak, medium, strong are pulled together pair by pair, so every image counts in every
step. The paper publishes neither the weights nor the medium view: the weights here, and one operation of RandAugment
without cutout, are ours.
"""
from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import Bool, Float, Option, run_main
from TorchSSL.core.algorithm import Algorithm, Batch, consistency, joint_logits, pseudo_label_metrics
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--ulb_loss_ratio", Float(0), 1.0, "weight of the loss on confident unlabelled images"),
    Option("--kl_loss_ratio", Float(0), 1.0, "weight of the divergence between the views of the others"),
    Option("--p_cutoff", Float(0, 1), 0.95, "least confidence of a pseudo-label"),
    Option("--hard_label", Bool, True, "learn the most likely class; False: the softened probabilities"),
    Option("--T", Float(1e-3), 0.5, "temperature of soft labels and of the targets of the divergences"),
)
parse = partial(learner_options, "sequencematch", __doc__, FLAGS)


class SequenceMatch(Algorithm):
    """The loss of SequenceMatch; it has no state."""

    views = ("weak", "medium", "strong")

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        labeled, weak, medium, strong = joint_logits(net, batch)
        supervised = F.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        confidence, label = weak.softmax(1).max(1)
        mask = (confidence >= self.options.p_cutoff).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(medium, target, mask) + consistency(strong, target, mask)

        pairs = ((weak, medium), (medium, strong), (weak, strong))  # leader and follower
        divergence = sum(self.divergence(leader, follower, 1 - mask) for leader, follower in pairs)

        total = supervised + self.options.ulb_loss_ratio * unsupervised + self.options.kl_loss_ratio * divergence
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised,
                       "train/divergence_loss": divergence, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth)}

    def divergence(self, leader: Tensor, follower: Tensor, mask: Tensor) -> Tensor:
        """Return the masked mean KL(sharpened leader || follower) of logits [n, C]; its gradient moves the follower."""
        target = (leader.detach() / self.options.T).softmax(1)
        each = F.kl_div(follower.log_softmax(1), target, reduction="none").sum(1)
        return (mask * each).mean()


if __name__ == "__main__":
    run_main(lambda: train(parse(), SequenceMatch))
