"""MetaSemi on SVHN, CIFAR-10, CIFAR-100 and the digits: consistency guided by the gradient of the labelled loss.

Zhang et al., "Semi-Supervised Learning with Meta-Gradient", AISTATS 2021 (arXiv 2007.03966).

    python train_meta.py --dataset cifar10 --num-label 4000 -a convlarge --mix-up --save-path results/cifar-10
    python train_meta.py --dataset digits --num-label 20 -a small --mix-up --total-steps 600 --warmup 100

Each step corrects the pseudo-labels of its unlabelled images by the meta-gradient (meta.py), then descends the mix-up
loss, or the labelled loss, and the squared distance to the pseudo-labels.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from MetaSemi.core.data import SmallImages
from MetaSemi.core.evaluation import accuracy
from MetaSemi.core.meta import MetaGradient, compute_weight, meta_step
from MetaSemi.core.options import DATA_AND_NETWORK, EPSILON, META, MIX_UP, OPTIMISATION, OURS, RUNNING, read_options
from MetaSemi.core.training import Training
from shared.cli import Choice, Float, Option, less_memory, run_main

LINE = ("Step {step:05d} Dtime: {dtime:.3f} Btime: {btime:.3f} Lloss: {label_loss:.3f} (avg {label_loss_avg:.3f}) "
        "Uloss: {unlabel_loss:.3f} (avg {unlabel_loss_avg:.3f}) Lacc: {label_acc:.3f} (avg {label_acc_avg:.3f}) "
        "Uacc: {unlabel_acc:.3f} (avg {unlabel_acc_avg:.3f}) LR: {rate:.4f}")
FLAGS = {
    "data and network": DATA_AND_NETWORK,
    "method": (*MIX_UP, Option("--weight", Float(0), 1.0, "final weight of the unlabelled loss"), EPSILON),
    "optimisation": OPTIMISATION,
    "running": RUNNING,
    "beyond the published flags": (*META, Option("--eval-gate", Choice("random", "half"), "random", "Shake-Shake gate "
                                                 "in the gradient of evaluation mode"), *OURS),
}


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    return read_options("train_meta", __doc__, FLAGS, argv)


@less_memory("--batch-size")
def main() -> None:
    options = parse()
    training = Training(options, SmallImages, unlabeled=True)
    meta = MetaGradient(options.epsilon, options.meta_grad == "exact", options.local_meta, options.meta_lr,
                        training.autocast)
    for step, rate, batch in training.steps():
        weight = compute_weight(options.weight, step, options.warmup)
        result = meta_step(training.net, training.optimizer, batch.labeled, batch.labels, batch.unlabeled, rate=rate,
                           weight=weight, lam=training.mixing(step), meta=meta, world=training.world)
        values = {"label_loss": result.label_loss, "unlabel_loss": result.unlabel_loss,
                  "label_acc": accuracy(result.label_logits, batch.labels)[0][0],
                  "unlabel_acc": accuracy(result.unlabel_logits, batch.truth)[0][0]}
        if options.mix_up:
            values["interp_loss"] = result.interp_loss
        training.log(LINE, result.loss, **values)


if __name__ == "__main__":
    run_main(main)
