"""FreeMatch: pseudo-labels above thresholds that follow the network's own confidence (stages 1 and 3 of DPT).

Wang et al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", ICLR 2023 (arXiv 2205.07246).

    python freematch.py --c config/freematch_cifar10_40_1.yaml
    python freematch.py --c config/freematch_cifar10_40_1_aug1000.yaml --aug_path=./data-aug/nums_1000

Of an unlabelled image the weak view gives a pseudo-label and a confidence; where the confidence reaches the threshold
of that class, the strong view learns the pseudo-label. Everything else (data, optimiser, averaging) is trainer.py.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import parse_bool, run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, joint_logits
from TorchSSL.core.options import POSITIVE, SHARE, TEMPERATURE, Flag, parse_options
from TorchSSL.core.pseudo_labels import consistency, pseudo_label_metrics

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch
    from TorchSSL.core.setting import Setting

torch = lazy("torch")

FLAGS = (
    Flag("--ulb_loss_ratio", POSITIVE, 1.0, "weight of the loss on unlabelled images"),
    Flag("--ent_loss_ratio", POSITIVE, 0.0, "weight of the fairness term (DPT: none)"),
    Flag("--hard_label", parse_bool, True, "learn the most likely class; False: the softened probabilities"),
    Flag("--T", TEMPERATURE, 0.5, "temperature of soft labels"),
    Flag("--ema_p", SHARE, 0.999, "momentum of the threshold statistics"),
    Flag("--use_quantile", parse_bool, False, "global threshold: the 0.8 quantile of confidences, not their mean"),
    Flag("--clip_thresh", parse_bool, False, "keep the global threshold at 0.95 or below"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("freematch", __doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, FreeMatch)


class FreeMatch(Algorithm):
    """State and loss of FreeMatch.

    State, float32, moving averages over the global batch: `time_p` [] the confidence, which is the global threshold;
    `p_model` [C] the prediction, which makes the thresholds of the classes differ; `label_hist` [C] how often each
    class is the pseudo-label. All start at 1/C.
    """

    views = ("weak", "strong")
    state = ("time_p", "p_model", "label_hist")

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        super().__init__(options, setting)
        uniform = torch.full((setting.num_classes,), 1 / setting.num_classes, device=setting.device)
        self.time_p, self.p_model, self.label_hist = uniform[0].clone(), uniform.clone(), uniform.clone()
        # SVHN is first learned from the labels alone, and its thresholds stay between 0.9 and 0.95.
        self.is_svhn = options.dataset == "svhn"
        self.supervised_steps = 2049 if self.is_svhn else 0

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend and the numbers to log.

        All views go through the network together, so that weak views take part in its batch statistics.
        """
        labeled, weak, strong = joint_logits(net, batch)
        supervised = torch.nn.functional.cross_entropy(labeled, batch.labels)

        weak = weak.detach()
        probabilities = weak.softmax(1)
        confidence, label = probabilities.max(1)
        self.update(probabilities)  # before the thresholds are used
        mask = (confidence >= self.thresholds()[label]).float()
        target = label if self.options.hard_label else (weak / self.options.T).softmax(1)
        unsupervised = consistency(strong, target, mask)

        total = supervised + self.options.ulb_loss_ratio * unsupervised
        metrics = {"train/sup_loss": supervised, "train/unsup_loss": unsupervised}
        if self.options.ent_loss_ratio:
            entropy, strong_hist = self.fairness(strong, mask)
            total = total + self.options.ent_loss_ratio * entropy
            metrics |= {"train/ent_loss": entropy, "train/ps_label_hist": strong_hist.mean()}
        return total, {**metrics, "train/total_loss": total, **self.report(label, mask, batch.truth)}

    def update(self, probabilities: torch.Tensor) -> None:
        """Move the statistics towards those of this batch; probabilities: weak-view softmax [n, C] of this rank."""
        confidence, label = probabilities.max(1)
        batch = torch.stack([confidence.mean().expand(probabilities.shape[1]), probabilities.mean(0),
                             self.histogram(label)])
        time_p, p_model, label_hist = self.setting.mean(batch)  # one message between ranks for all three
        time_p = time_p[0]
        if self.options.use_quantile:
            time_p = torch.quantile(self.setting.gather(confidence), 0.8)
        self.time_p = self.moved(self.time_p, time_p)
        if self.options.clip_thresh:
            self.time_p = self.time_p.clamp(0.0, 0.95)
        self.p_model = self.moved(self.p_model, p_model)
        self.label_hist = self.moved(self.label_hist, label_hist)

    def moved(self, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """Return the moving average of a statistic; its first value where there is none yet."""
        return new if old is None else self.options.ema_p * old + (1 - self.options.ema_p) * new

    def thresholds(self) -> torch.Tensor:
        """Return the threshold of every class [C]: the global one, scaled by how common the class is."""
        thresholds = self.time_p * self.p_model / self.p_model.max()
        return thresholds.clamp(0.9, 0.95) if self.is_svhn else thresholds

    def fairness(self, strong: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the self-adaptive fairness loss [] (0 where no image was kept) and its class histogram [C].

        It draws the mean prediction on kept strong views, relative to how often each class is predicted there, towards
        the same ratio of the weak views. strong: logits [n, C]; mask: 0 or 1 [n].
        """
        probabilities = strong.softmax(1)
        label = strong.detach().argmax(1)
        # The global batch's sums, so that the number of ranks makes no difference; gradients flow through the first.
        mean = self.setting.sum_with_gradient((probabilities * mask[:, None]).sum(0))
        hist = self.setting.sum(self.histogram(label, mask))
        kept = hist.sum()
        mean, hist = mean / kept.clamp(min=1), hist / kept.clamp(min=1)
        expected, found = relative(self.p_model, self.label_hist), relative(mean, hist)
        return (expected * torch.log(found + 1e-12)).sum() * (kept > 0), hist

    def histogram(self, label: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the share of every class among labels [n] -> [C]; with weights [n], the sum of weights instead."""
        each = torch.full_like(label, 1 / len(label), dtype=torch.float32) if weight is None else weight
        return torch.zeros(self.setting.num_classes, device=label.device).scatter_add_(0, label, each)

    def report(self, label: torch.Tensor, mask: torch.Tensor, truth: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what to log: the published names first (`mask_ratio` is the share rejected, means are 1/C)."""
        return {
            "train/time_p": self.time_p, "train/p_model": self.p_model.mean(),
            "train/label_hist": self.label_hist.mean(), **pseudo_label_metrics(mask, label, truth, self.thresholds()),
            "train/p_model_min": self.p_model.min(), "train/p_model_max": self.p_model.max()}


def relative(mean: torch.Tensor, hist: torch.Tensor) -> torch.Tensor:
    """Return mean / hist [C], normalised to sum 1; classes that `hist` lacks count as 0, and nothing at all gives 0."""
    ratio = torch.where(hist > 0, mean / hist.clamp(min=1e-12), 0.0)
    return ratio / ratio.sum().clamp(min=1e-12)


if __name__ == "__main__":
    run_main(main)
