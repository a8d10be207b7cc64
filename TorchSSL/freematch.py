"""FreeMatch: pseudo-labels above thresholds that follow the network's own confidence (stages 1 and 3 of DPT).

Wang et al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", ICLR 2023 (arXiv 2205.07246).

    python freematch.py --c config/freematch_cifar10_40_1.yaml
    python freematch.py --c config/freematch_cifar10_40_1_aug1000.yaml --aug_path=./data-aug/nums_1000

The weak view of an unlabelled image gives a pseudo-label and a confidence. If the confidence reaches the threshold of
that class, the strong view learns the pseudo-label. Data, optimiser and averaging: core/trainer.py.
"""
from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared import distributed
from shared.cli import Bool, Float, Option, run_main
from TorchSSL.core.algorithm import Algorithm, Batch, Setting, consistency, joint_logits, pseudo_label_metrics
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--ulb_loss_ratio", Float(0), 1.0, "weight of the loss on unlabelled images"),
    Option("--ent_loss_ratio", Float(0), 0.0, "weight of the fairness term (DPT: none)"),
    Option("--hard_label", Bool, True, "learn the most likely class; False: the softened probabilities"),
    Option("--T", Float(1e-3), 0.5, "temperature of soft labels"),
    Option("--ema_p", Float(0, 1), 0.999, "momentum of the threshold statistics"),
    Option("--use_quantile", Bool, False, "global threshold: the 0.8 quantile of confidences, not their mean"),
    Option("--clip_thresh", Bool, False, "keep the global threshold at 0.95 or below"),
)
parse = partial(learner_options, "freematch", __doc__, FLAGS)


class FreeMatch(Algorithm):
    """State and loss of FreeMatch.

    State, float32, moving averages over the global batch: `time_p` [] the confidence (the global threshold);
    `p_model` [C] the prediction (scales the threshold of each class); `label_hist` [C] the frequency of each class
    among the pseudo-labels. All start at 1/C.
    """

    views = ("weak", "strong")
    state = ("time_p", "p_model", "label_hist")

    def __init__(self, options: SimpleNamespace, setting: Setting) -> None:
        super().__init__(options, setting)
        uniform = torch.full((setting.num_classes,), 1 / setting.num_classes, device=setting.device)
        self.time_p, self.p_model, self.label_hist = uniform[0].clone(), uniform.clone(), uniform.clone()
        # SVHN is first learned from the labels alone, and its thresholds stay between 0.9 and 0.95.
        self.is_svhn = options.dataset == "svhn"
        self.supervised_steps = 2049 if self.is_svhn else 0

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        labeled, weak, strong = joint_logits(net, batch)
        supervised = F.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        probabilities = weak.softmax(1)
        confidence, label = probabilities.max(1)
        self.update(probabilities)  # before the thresholds are used
        mask = (confidence >= self.thresholds()[label]).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(strong, target, mask)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        values = {"train/sup_loss": supervised, "train/unsup_loss": unsupervised}
        if self.options.ent_loss_ratio:
            entropy, strong_hist = self.fairness(strong, mask)
            total = total + self.options.ent_loss_ratio * entropy
            values |= {"train/ent_loss": entropy, "train/ps_label_hist": strong_hist.mean()}
        return total, {
            **values, "train/total_loss": total, "train/time_p": self.time_p, "train/p_model": self.p_model.mean(),
            "train/label_hist": self.label_hist.mean(),
            **pseudo_label_metrics(mask, label, batch.truth, self.thresholds()),
            "train/p_model_min": self.p_model.min(), "train/p_model_max": self.p_model.max()}

    def update(self, probabilities: Tensor) -> None:
        """Move the statistics towards those of this batch; probabilities: weak-view softmax [n, C] of this rank."""
        confidence, label = probabilities.max(1)
        batch = torch.stack([confidence.mean().expand(probabilities.shape[1]), probabilities.mean(0),
                             self.histogram(label)])
        # One message between ranks for all three.
        time_p, p_model, label_hist = distributed.mean(batch, self.setting.world)
        time_p = time_p[0]
        if self.options.use_quantile:
            time_p = torch.quantile(distributed.gather(confidence, self.setting.world), 0.8)
        self.time_p = self.moved(self.time_p, time_p)
        if self.options.clip_thresh:
            self.time_p = self.time_p.clamp(0.0, 0.95)
        self.p_model = self.moved(self.p_model, p_model)
        self.label_hist = self.moved(self.label_hist, label_hist)

    def moved(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return the moving average of a statistic; None has no value yet."""
        return new if old is None else self.options.ema_p * old + (1 - self.options.ema_p) * new

    def thresholds(self) -> Tensor:
        """Return the threshold of every class [C]: the global one, scaled by the frequency of the class."""
        thresholds = self.time_p * self.p_model / self.p_model.max()
        return thresholds.clamp(0.9, 0.95) if self.is_svhn else thresholds

    def fairness(self, strong: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the self-adaptive fairness loss [] (0 if no image was kept) and its class histogram [C].

        The mean prediction on kept strong views, divided by the frequency of their predicted classes, moves towards
        the same ratio of the weak views. strong: logits [n, C]; mask: 0 or 1 [n].
        """
        probabilities, world = strong.softmax(1), self.setting.world
        label = strong.detach().argmax(1)
        # Sums over the global batch, independent of the number of ranks; gradients flow through the first.
        mean = distributed.sum_with_gradient((probabilities * mask[:, None]).sum(0), world)
        hist = distributed.all_sum(self.histogram(label, mask), world)
        kept = hist.sum()
        mean, hist = mean / kept.clamp(min=1), hist / kept.clamp(min=1)
        expected, actual = relative(self.p_model, self.label_hist), relative(mean, hist)
        return (expected * torch.log(actual + 1e-12)).sum() * (kept > 0), hist

    def histogram(self, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the fraction of every class among labels [n] -> [C]; with weights [n], the sum of weights instead."""
        each = torch.full_like(label, 1 / len(label), dtype=torch.float32) if weight is None else weight
        return torch.zeros(self.setting.num_classes, device=label.device).scatter_add_(0, label, each)


def relative(mean: Tensor, hist: Tensor) -> Tensor:
    """Return mean / hist [C], normalised to sum 1; classes absent from `hist` count as 0."""
    ratio = torch.where(hist > 0, mean / hist.clamp(min=1e-12), 0.0)
    return ratio / ratio.sum().clamp(min=1e-12)


if __name__ == "__main__":
    run_main(lambda: train(parse(), FreeMatch))
