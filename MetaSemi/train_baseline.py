"""The baselines of MetaSemi on SVHN, CIFAR-10, CIFAR-100 and the digits: the labelled images alone, or mix-up.

    python train_baseline.py --dataset cifar10 --num-label 4000 --save-path results/cifar-10-labels
    python train_baseline.py --dataset cifar10 --num-label 4000 --mix-up --save-path results/cifar-10-mix-up

With --mix-up, labelled images are mixed with unlabelled ones, whose target is the network's own prediction, not
corrected by a meta-gradient; there is no other unlabelled loss.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from MetaSemi.core.data import SmallImages
from MetaSemi.core.evaluation import accuracy
from MetaSemi.core.meta import supervised_step
from MetaSemi.core.options import DATA_AND_NETWORK, MIX_UP, OPTIMISATION, OURS, RUNNING, read_options
from MetaSemi.core.training import Training
from shared.cli import less_memory, run_main

LINE = ("Step: [{step:05d}/{total}] Dtime: {dtime:.3f} Btime: {btime:.3f} loss: {loss:.3f} (avg {loss_avg:.3f}) "
        "Lacc: {label_acc:.3f} (avg {label_acc_avg:.3f}) LR: {rate:.4f}")
FLAGS = {
    "data and network": DATA_AND_NETWORK,
    "method": MIX_UP,
    "optimisation": OPTIMISATION,
    "running": RUNNING,
    "beyond the published flags": OURS,
}


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    return read_options("train_baseline", __doc__, FLAGS, argv)


@less_memory("--batch-size")
def main() -> None:
    options = parse()
    training = Training(options, SmallImages, unlabeled=options.mix_up)
    for step, rate, batch in training.steps():
        result = supervised_step(training.net, training.optimizer, batch.labeled, batch.labels, batch.unlabeled,
                                 rate=rate, lam=training.mixing(step), autocast=training.autocast,
                                 world=training.world)
        values = {"loss": result.loss, "label_acc": accuracy(result.label_logits, batch.labels)[0][0]}
        if options.mix_up:
            values["unlabel_acc"] = accuracy(result.unlabel_logits, batch.truth)[0][0]
        training.log(LINE, result.loss, **values)


if __name__ == "__main__":
    run_main(main)
