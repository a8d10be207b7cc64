"""DeFixMatch: FixMatch without its bias; the same loss on the labelled images is subtracted.

Schmutz, Humbert and Mattei, "Don't fear the unlabelled: safe semi-supervised learning via debiasing", ICLR 2023
(arXiv 2203.07512).

    python defixmatch.py --dataset cifar10 --num_labels 40 --save_name defixmatch_cifar10_40_0

The loss on unlabelled images pulls the risk away from the true one. Its expectation on labelled images is the same, so
subtracting it there (a control variate) leaves an unbiased estimate of the supervised risk, for any weight. The
subtracted loss of strong views has no upper bound. So the supervised loss is the mean over a weak and a strong view: at
weights up to 1/2 it outweighs the correction where label and pseudo-label agree.
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
    Option("--ulb_loss_ratio", Float(0), 0.5, "weight of the loss on unlabelled images, and of its correction; above "
           "0.5 the sum has no lower bound"),
    Option("--p_cutoff", Float(0, 1), 0.95, "least confidence of a pseudo-label"),
    Option("--hard_label", Bool, True, "learn the most likely class; False: the softened probabilities"),
    Option("--T", Float(1e-3), 0.5, "temperature of soft labels"),
)
parse = partial(learner_options, "defixmatch", __doc__, FLAGS)


class DeFixMatch(Algorithm):
    """The loss of DeFixMatch; it has no state."""

    views = ("weak", "strong")
    labeled_views = ("strong",)

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend (equation 3) and the numbers to log."""
        labeled, weak, strong, labeled_strong = joint_logits(net, batch)
        supervised = (F.cross_entropy(labeled, batch.labels) + F.cross_entropy(labeled_strong, batch.labels)) / 2
        unsupervised, mask, label = self.pseudo_label_loss(weak, strong)
        correction, _, _ = self.pseudo_label_loss(labeled, labeled_strong)  # as if their labels were unknown

        total = supervised + self.options.ulb_loss_ratio * (unsupervised - correction)
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised,
                       "train/correction_loss": correction, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth)}

    def pseudo_label_loss(self, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return FixMatch's loss [] of logits [n, C], the mask of the images kept [n] and their classes [n]."""
        weak = weak.detach()
        confidence, label = weak.softmax(1).max(1)
        mask = (confidence >= self.options.p_cutoff).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        return consistency(strong, target, mask), mask, label


if __name__ == "__main__":
    run_main(lambda: train(parse(), DeFixMatch))
