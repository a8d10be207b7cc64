"""FixMatch: a confident prediction on the weak view is the label of the strong view.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020
(arXiv 2001.07685).

    python fixmatch.py --c config/fixmatch/fixmatch_cifar10_40_0.yaml
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
    Option("--ulb_loss_ratio", Float(0), 1.0, "weight of the loss on unlabelled images"),
    Option("--p_cutoff", Float(0, 1), 0.95, "least confidence of a pseudo-label"),
    Option("--hard_label", Bool, True, "learn the most likely class; False: the softened probabilities"),
    Option("--T", Float(1e-3), 0.5, "temperature of soft labels"),
)
parse = partial(learner_options, "fixmatch", __doc__, FLAGS)


class FixMatch(Algorithm):
    """The loss of FixMatch; it has no state."""

    views = ("weak", "strong")

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend (equations 3 and 4) and the numbers to log."""
        labeled, weak, strong = joint_logits(net, batch)
        supervised = F.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        confidence, label = weak.softmax(1).max(1)
        mask = (confidence >= self.options.p_cutoff).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(strong, target, mask)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth)}


if __name__ == "__main__":
    run_main(lambda: train(parse(), FixMatch))
