"""SoftMatch: every unlabelled image counts, by a Gaussian of how far its confidence is below the average.

Chen et al., "SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning", ICLR 2023
(arXiv 2301.10921).

    python softmatch.py --c config/softmatch/softmatch_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import parse_bool, run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, joint_logits
from TorchSSL.core.options import POSITIVE, SHARE, TEMPERATURE, Flag, parse_options
from TorchSSL.core.pseudo_labels import consistency, normalised, pseudo_label_metrics

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch
    from TorchSSL.core.setting import Setting

torch = lazy("torch")

FLAGS = (
    Flag("--ulb_loss_ratio", POSITIVE, 1.0, "weight of the loss on unlabelled images"),
    Flag("--dist_align", parse_bool, True, "weigh by predictions aligned with those on labelled images"),
    Flag("--hard_label", parse_bool, True, "learn the most likely class; False: the softened probabilities"),
    Flag("--T", TEMPERATURE, 0.5, "temperature of soft labels"),
    Flag("--ema_p", SHARE, 0.999, "momentum of the statistics"),
)
SHARPNESS = 4  # the variance is divided by 2^2: n_sigma of the paper


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("softmatch", __doc__, FLAGS, argv, save_name="freematch")


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, SoftMatch)


class SoftMatch(Algorithm):
    """State and loss of SoftMatch.

    State, moving averages over the global batch: `lb_prob_t`, `ulb_prob_t` [C] the predictions on labelled and on
    unlabelled images; `prob_max_mu_t`, `prob_max_var_t` [] mean and variance of the confidence.
    """

    views = ("weak", "strong")
    state = ("lb_prob_t", "ulb_prob_t", "prob_max_mu_t", "prob_max_var_t")

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        super().__init__(options, setting)
        uniform = torch.full((setting.num_classes,), 1 / setting.num_classes, device=setting.device)
        self.lb_prob_t, self.ulb_prob_t = uniform.clone(), uniform.clone()
        self.prob_max_mu_t, self.prob_max_var_t = uniform[0].clone(), torch.ones((), device=setting.device)

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend and the numbers to log."""
        labeled, weak, strong = joint_logits(net, batch)
        supervised = torch.nn.functional.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        probabilities = weak.softmax(1)
        self.update(labeled.detach().softmax(1), probabilities)
        confidence = self.aligned(probabilities).max(1).values
        weight = self.weight(confidence)
        label = probabilities.argmax(1)  # of the predictions as they are
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(strong, target, weight)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        return total, {
            "train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total,
            **pseudo_label_metrics(weight, label, batch.truth), "train/avg_w": weight.mean(),
            "train/avg_max_prob": confidence.mean(), "train/avg_prob_t": self.ulb_prob_t.mean(),
            "train/avg_mu_t": self.prob_max_mu_t, "train/avg_var_t": self.prob_max_var_t}

    def update(self, labeled: torch.Tensor, weak: torch.Tensor) -> None:
        """Move the statistics towards those of this batch of probabilities [B, C] and [n, C] (equation 6)."""
        keep, confidence = self.options.ema_p, self.setting.gather(weak.max(1).values)
        self.lb_prob_t = keep * self.lb_prob_t + (1 - keep) * self.setting.mean(labeled.mean(0))
        self.ulb_prob_t = keep * self.ulb_prob_t + (1 - keep) * self.setting.mean(weak.mean(0))
        self.prob_max_mu_t = keep * self.prob_max_mu_t + (1 - keep) * confidence.mean()
        self.prob_max_var_t = keep * self.prob_max_var_t + (1 - keep) * confidence.var()

    def aligned(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return probabilities [n, C] scaled to the class shares predicted on labelled images (equation 8)."""
        if not self.options.dist_align:
            return probabilities
        return normalised(probabilities * self.lb_prob_t / self.ulb_prob_t)

    def weight(self, confidence: torch.Tensor) -> torch.Tensor:
        """Return the weights [n]: 1 above the mean confidence, the truncated Gaussian below it (equation 5)."""
        below = (confidence - self.prob_max_mu_t).clamp(max=0)
        return torch.exp(-below ** 2 / (2 * self.prob_max_var_t / SHARPNESS))


if __name__ == "__main__":
    run_main(main)
