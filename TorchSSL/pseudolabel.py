"""Pseudo-Label: confident predictions on unlabelled images become their labels.

Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML Workshop
on Challenges in Representation Learning 2013.

    python pseudolabel.py --c config/pseudolabel/pseudolabel_cifar10_40_0.yaml
    python pseudolabel.py --c config/pseudolabel_flex/pseudolabel_flex_cifar10_40_0.yaml    # FlexMatch's thresholds
"""
from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import Bool, Float, Option, run_main
from TorchSSL.core.algorithm import (
    Algorithm,
    Batch,
    ClassStatus,
    Setting,
    classify,
    consistency,
    frozen_batchnorm,
    pseudo_label_metrics,
    ramp_up,
)
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--ulb_loss_ratio", Float(0), 1.0, "weight of the loss on unlabelled images"),
    Option("--p_cutoff", Float(0, 1), 0.95, "least confidence of a pseudo-label"),
    Option("--unsup_warmup_pos", Float(0, 1), 0.4, "fraction of the training in which that weight rises from 0"),
    Option("--use_flex", Bool, False, "thresholds of FlexMatch, with p_cutoff for the class learned best"),
)
parse = partial(learner_options, "pseudolabel", __doc__, FLAGS, also="pseudolabel_flex", seed=0, uratio=1)


class PseudoLabel(Algorithm):
    """Loss of Pseudo-Label, and with `use_flex` the state of FlexMatch."""

    views = ("weak",)
    state = ("status",)

    def __init__(self, options: SimpleNamespace, setting: Setting) -> None:
        super().__init__(options, setting)
        self.status = ClassStatus(setting)

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        supervised = F.cross_entropy(classify(net, batch.labeled), batch.labels)
        with frozen_batchnorm(net):
            weak = classify(net, batch.views[0])

        confidence, label = weak.detach().softmax(1).max(1)
        thresholds = torch.full_like(self.status.beta, self.options.p_cutoff)
        if self.options.use_flex:
            self.status.refresh()
            thresholds = self.status.thresholds(self.options.p_cutoff)
            self.status.remember(batch.index, label, confidence >= self.options.p_cutoff)
        mask = (confidence >= thresholds[label]).float()
        unsupervised = consistency(weak, label, mask)

        ramp = ramp_up(step, self.options.unsup_warmup_pos, self.options.num_train_iter)
        total = supervised + self.options.ulb_loss_ratio * ramp * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
                       **pseudo_label_metrics(mask, label, batch.truth, thresholds)}


if __name__ == "__main__":
    run_main(lambda: train(parse(), PseudoLabel))
