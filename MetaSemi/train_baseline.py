"""The baselines of MetaSemi on SVHN, CIFAR-10, CIFAR-100 and the digits: the labelled images alone, or mix-up.

    python train_baseline.py --dataset cifar10 --num-label 4000 --save-path results/cifar-10-labels
    python train_baseline.py --dataset cifar10 --num-label 4000 --mix-up --save-path results/cifar-10-mix-up

With --mix-up, labelled images are mixed with unlabelled ones, whose target is the network's own prediction, not
corrected by a meta-gradient; there is no other unlabelled loss.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from MetaSemi.core import options as shared_options
from MetaSemi.core.schedules import learning_rate
from shared.cli import run_main

LINE = ("Step: [{step:05d}/{total}] Dtime: {dtime:.3f} Btime: {btime:.3f} loss: {loss:.3f} (avg {loss_avg:.3f}) "
        "Lacc: {label_acc:.3f} (avg {label_acc_avg:.3f}) LR: {rate:.4f}")


FLAGS = {
    "data and network": shared_options.DATA_AND_NETWORK,
    "method": shared_options.MIX_UP,
    "optimisation": shared_options.OPTIMISATION,
    "running": shared_options.RUNNING,
    "beyond the published flags": shared_options.OURS,
}


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    return shared_options.read_options("train_baseline", __doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    # These load torch: only once the command line is known to be right.
    from MetaSemi.core.meta import supervised_step
    from MetaSemi.core.meters import accuracy
    from MetaSemi.core.training import Training

    training = Training(options, unlabeled=options.mix_up)
    for step, batch in training.steps():
        rate = learning_rate(step, options.lr, options.warmup, options.gamma, options.milestones)
        result = supervised_step(training.net, training.optimizer, batch.labeled, batch.labels, batch.unlabeled,
                                 rate=rate, lam=training.mixing(step), autocast=training.autocast,
                                 world=training.world)
        values = {"loss": result.loss, "label_acc": accuracy(result.label_logits, batch.labels)[0][0]}
        if options.mix_up:
            values["unlabel_acc"] = accuracy(result.unlabel_logits, batch.truth)[0][0]
        training.log(LINE, rate, result.loss, **values)


if __name__ == "__main__":
    run_main(main)
