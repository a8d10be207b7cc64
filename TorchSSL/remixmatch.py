"""ReMixMatch: MixMatch with aligned guesses from the weak view, learned on strong views; with rotations.

Berthelot et al., "ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring", ICLR
2020 (arXiv 1911.09785).

    python remixmatch.py --c config/remixmatch/remixmatch_cifar10_40_0.yaml
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
    DistributionAlignment,
    Setting,
    classify,
    frozen_batchnorm,
    ramp_up,
    sharpen,
)
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train
from TorchSSL.mixmatch import draw_mixing, forward_mixed

FLAGS = (
    Option("--w_match", Float(0), 1.5, "weight of the loss on mixed unlabelled images"),
    Option("--w_kl", Float(0), 0.5, "weight of the loss on the first strong view, unmixed"),
    Option("--w_rot", Float(0), 0.5, "weight of the loss of predicting quarter turns"),
    Option("--warm_up", Float(0, 1), 1 / 64, "fraction of the training in which the first two weights rise from 0"),
    Option("--alpha", Float(1e-3), 0.75, "both parameters of the beta distribution of the mixing"),
    Option("--T", Float(1e-3), 0.5, "temperature that sharpens the guessed labels"),
    Option("--ulb_loss_ratio", Float(0), 1.0, "accepted, not used: the weights are those above"),
    Option("--use_dm", Bool, True, "accepted, not used: predictions are always aligned"),
    Option("--use_xe", Bool, True, "accepted, not used: the loss is always a cross-entropy"),
)
parse = partial(learner_options, "remixmatch", __doc__, FLAGS, amp=True, seed=0, uratio=1, num_labels=4000,
                num_eval_iter=1000)


class ReMixMatch(Algorithm):
    """State and loss of ReMixMatch. `alignment`: the average prediction on unlabelled images."""

    views = ("weak", "strong", "strong", "rotated")
    state = ("alignment",)
    rotation_head = True

    def __init__(self, options: SimpleNamespace, setting: Setting) -> None:
        super().__init__(options, setting)
        self.alignment = DistributionAlignment(setting)

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend (equation 6) and the numbers to log."""
        options = self.options
        weak, strong, second_strong, rotated = batch.views
        one_hot = F.one_hot(batch.labels, self.setting.num_classes).float()
        guess = self.guess(net, weak)
        inputs = [batch.labeled, strong, second_strong, weak]
        beta, permutation = draw_mixing(self.setting, options.alpha, inputs, step)
        mixed = forward_mixed(net, self.setting, inputs, [one_hot, guess, guess, guess], beta, permutation)
        supervised, unsupervised = mixed.means(F.cross_entropy(mixed.logits, mixed.targets, reduction="none"))

        with frozen_batchnorm(net):
            unmixed = F.cross_entropy(classify(net, strong), guess)
            rotation = F.cross_entropy(net(rotated)[1].float(), batch.turns)

        ramp = ramp_up(step, options.warm_up, options.num_train_iter)
        total = (supervised + options.w_rot * rotation + options.w_kl * ramp * unmixed
                 + options.w_match * ramp * unsupervised)
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/kl_loss": unmixed,
                       "train/rot_loss": rotation, "train/total_loss": total}

    def guess(self, net: nn.Module, weak: Tensor) -> Tensor:
        """Return the labels guessed from the weak views [n, C]: aligned with the labelled images, sharpened."""
        with torch.no_grad(), frozen_batchnorm(net):
            probabilities = classify(net, weak).softmax(1)
        return sharpen(self.alignment(probabilities), self.options.T)


if __name__ == "__main__":
    run_main(lambda: train(parse(), ReMixMatch))
