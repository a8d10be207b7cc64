"""FlexMatch: FixMatch with a threshold for every class, lower for classes that are learned slowly.

Zhang et al., "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling", NeurIPS 2021
(arXiv 2110.08263).

    python flexmatch.py --c config/flexmatch/flexmatch_cifar10_40_0.yaml
"""
from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import Bool, Float, Option, run_main
from TorchSSL.core.algorithm import (
    Algorithm,
    Batch,
    ClassStatus,
    DistributionAlignment,
    Setting,
    consistency,
    joint_logits,
    pseudo_label_metrics,
)
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--ulb_loss_ratio", Float(0), 1.0, "weight of the loss on unlabelled images"),
    Option("--p_cutoff", Float(0, 1), 0.95, "threshold of the best-learned class"),
    Option("--hard_label", Bool, True, "learn the most likely class; False: the softened probabilities"),
    Option("--T", Float(1e-3), 0.5, "temperature of soft labels"),
    Option("--use_DA", Bool, False, "align the predictions with the class fractions of the labelled images"),
    Option("--thresh_warmup -w", Bool, True, "count images without a pseudo-label as one class more"),
)
parse = partial(learner_options, "flexmatch", __doc__, FLAGS)


class FlexMatch(Algorithm):
    """State and loss of FlexMatch. `status`: the last confident pseudo-label of every unlabelled image."""

    views = ("weak", "strong")
    state = ("status", "alignment")

    def __init__(self, options: SimpleNamespace, setting: Setting) -> None:
        super().__init__(options, setting)
        self.status, self.alignment = ClassStatus(setting, options.thresh_warmup), DistributionAlignment(setting)

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        self.status.refresh()
        labeled, weak, strong = joint_logits(net, batch)
        supervised = F.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        probabilities = weak.softmax(1)
        if self.options.use_DA:
            probabilities = self.alignment(probabilities)
        confidence, label = probabilities.max(1)
        thresholds = self.status.thresholds(self.options.p_cutoff)
        mask = (confidence >= thresholds[label]).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(strong, target, mask)
        # Only labels above the fixed threshold count as learned.
        self.status.remember(batch.index, label, confidence >= self.options.p_cutoff)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth, thresholds)}


if __name__ == "__main__":
    run_main(lambda: train(parse(), FlexMatch))
