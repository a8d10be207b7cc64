"""MixMatch: guessed labels for unlabelled images, sharpened, and all images mixed with each other.

Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019 (arXiv 1905.02249).

    python mixmatch.py --c config/mixmatch/mixmatch_cifar10_40_0.yaml
"""
from __future__ import annotations

import contextlib
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.augment import mixing
from shared.augment.mixing import Mixed
from shared.cli import Float, Option, run_main
from shared.training.randomness import numpy_rng
from TorchSSL.core.algorithm import Algorithm, Batch, Setting, classify, frozen_batchnorm, ramp_up, sharpen
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--ulb_loss_ratio", Float(0), 100.0, "weight of the loss on unlabelled images"),
    Option("--ramp_up", Float(0, 1), 1 / 64, "fraction of the training in which that weight rises from 0"),
    Option("--alpha", Float(1e-3), 0.5, "both parameters of the beta distribution of the mixing"),
    Option("--T", Float(1e-3), 0.5, "temperature that sharpens the guessed labels"),
)
parse = partial(learner_options, "mixmatch", __doc__, FLAGS, amp=True, seed=0, uratio=1, num_labels=4000,
                num_eval_iter=1000)


class MixMatch(Algorithm):
    """The loss of MixMatch; it has no state."""

    views = ("weak", "weak")

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend (equations 2 to 5) and the numbers to log."""
        options, inputs = self.options, [batch.labeled, *batch.views]
        one_hot = F.one_hot(batch.labels, self.setting.num_classes).float()
        guess = self.guess(net, batch)
        beta, permutation = draw_mixing(self.setting, options.alpha, inputs, step)
        mixed = forward_mixed(net, self.setting, inputs, [one_hot, guess, guess], beta, permutation)

        supervised, _ = mixed.means(F.cross_entropy(mixed.logits, mixed.targets, reduction="none"))
        _, unsupervised = mixed.means(((mixed.logits.softmax(1) - mixed.targets) ** 2).mean(1))

        ramp = ramp_up(step, options.ramp_up, options.num_train_iter)
        total = supervised + options.ulb_loss_ratio * ramp * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total}

    def guess(self, net: nn.Module, batch: Batch) -> Tensor:
        """Return the labels guessed for the unlabelled images [n, C]: the mean over both views, sharpened."""
        with torch.no_grad(), frozen_batchnorm(net):
            first, second = (classify(net, view).softmax(1) for view in batch.views)
        return sharpen((first + second) / 2, self.options.T)


def draw_mixing(setting: Setting, alpha: float, inputs: list[Tensor], step: int) -> tuple[float, np.ndarray]:
    """Draw from Beta(alpha, alpha), and a permutation of all images of all ranks, int64 [n]."""
    rng = numpy_rng(setting.seed, step, "mixing")
    return float(rng.beta(alpha, alpha)), rng.permutation(sum(map(len, inputs)) * setting.world.size)


def forward_mixed(net: nn.Module, setting: Setting, inputs: list[Tensor], targets: list[Tensor], beta: float,
                  permutation: np.ndarray) -> Mixed:
    """Mix the images of all ranks and classify them, as shared.augment.mixing.forward_mixed.

    Only the first chunk moves the running statistics of batch norm.
    """
    def logits(images: Tensor, chunk: int) -> Tensor:
        with frozen_batchnorm(net) if chunk else contextlib.nullcontext():
            return classify(net, images)

    return mixing.forward_mixed(logits, setting.world, inputs, targets, beta, permutation)


if __name__ == "__main__":
    run_main(lambda: train(parse(), MixMatch))
