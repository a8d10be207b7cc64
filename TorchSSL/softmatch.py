"""SoftMatch: every unlabelled image counts, weighted by a Gaussian of its confidence below the average.

Chen et al., "SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning", ICLR 2023
(arXiv 2301.10921).

    python softmatch.py --c config/softmatch/softmatch_cifar10_40_0.yaml
"""
from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared import distributed
from shared.cli import Bool, Float, Option, run_main
from TorchSSL.core.algorithm import (
    Algorithm,
    Batch,
    Setting,
    consistency,
    joint_logits,
    normalised,
    pseudo_label_metrics,
)
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--ulb_loss_ratio", Float(0), 1.0, "weight of the loss on unlabelled images"),
    Option("--dist_align", Bool, True, "weigh by predictions aligned with those on labelled images"),
    Option("--hard_label", Bool, True, "learn the most likely class; False: the softened probabilities"),
    Option("--T", Float(1e-3), 0.5, "temperature of soft labels"),
    Option("--ema_p", Float(0, 1), 0.999, "momentum of the statistics"),
)
parse = partial(learner_options, "softmatch", __doc__, FLAGS, save_name="freematch")
SHARPNESS = 4  # the variance is divided by 2^2: n_sigma of the paper


class SoftMatch(Algorithm):
    """State and loss of SoftMatch.

    State, moving averages over the global batch: `lb_prob_t`, `ulb_prob_t` [C] the predictions on labelled and on
    unlabelled images; `prob_max_mu_t`, `prob_max_var_t` [] mean and variance of the confidence.
    """

    views = ("weak", "strong")
    state = ("lb_prob_t", "ulb_prob_t", "prob_max_mu_t", "prob_max_var_t")

    def __init__(self, options: SimpleNamespace, setting: Setting) -> None:
        super().__init__(options, setting)
        uniform = torch.full((setting.num_classes,), 1 / setting.num_classes, device=setting.device)
        self.lb_prob_t, self.ulb_prob_t = uniform.clone(), uniform.clone()
        self.prob_max_mu_t, self.prob_max_var_t = uniform[0].clone(), torch.ones((), device=setting.device)

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        labeled, weak, strong = joint_logits(net, batch)
        supervised = F.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        probabilities = weak.softmax(1)
        self.update(labeled.detach().softmax(1), probabilities)
        confidence = self.aligned(probabilities).max(1).values
        weight = self.weight(confidence)
        label = probabilities.argmax(1)  # of the predictions before alignment
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(strong, target, weight)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        return total, {
            "train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
            **pseudo_label_metrics(weight, label, batch.truth), "train/avg_w": weight.mean(),
            "train/avg_max_prob": confidence.mean(), "train/avg_prob_t": self.ulb_prob_t.mean(),
            "train/avg_mu_t": self.prob_max_mu_t, "train/avg_var_t": self.prob_max_var_t}

    def update(self, labeled: Tensor, weak: Tensor) -> None:
        """Move the statistics towards those of this batch of probabilities [B, C] and [n, C] (equation 6)."""
        keep, world = self.options.ema_p, self.setting.world
        confidence = distributed.gather(weak.max(1).values, world)
        self.lb_prob_t = keep * self.lb_prob_t + (1 - keep) * distributed.mean(labeled.mean(0), world)
        self.ulb_prob_t = keep * self.ulb_prob_t + (1 - keep) * distributed.mean(weak.mean(0), world)
        self.prob_max_mu_t = keep * self.prob_max_mu_t + (1 - keep) * confidence.mean()
        self.prob_max_var_t = keep * self.prob_max_var_t + (1 - keep) * confidence.var()

    def aligned(self, probabilities: Tensor) -> Tensor:
        """Return probabilities [n, C] scaled to the class fractions predicted on labelled images (equation 8)."""
        if not self.options.dist_align:
            return probabilities
        return normalised(probabilities * self.lb_prob_t / self.ulb_prob_t)

    def weight(self, confidence: Tensor) -> Tensor:
        """Return the weights [n]: 1 above the mean confidence, the truncated Gaussian below it (equation 5)."""
        below = (confidence - self.prob_max_mu_t).clamp(max=0)
        return torch.exp(-below ** 2 / (2 * self.prob_max_var_t / SHARPNESS))


if __name__ == "__main__":
    run_main(lambda: train(parse(), SoftMatch))
