"""The supervised baseline of MetaSemi on ImageNet: cross-entropy of the labelled tenth alone.

    torchrun --nproc_per_node=4 train_imagenet.py -a resnet18 --data /path/to/rec \\
        --save-path results/imagenet-baseline --batch-size 128

Starts alone, under torchrun, and under torch.distributed.launch.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor

from MetaSemi.core.evaluation import accuracy
from MetaSemi.core.meta import StepResult, supervised_step
from MetaSemi.core.options import (
    IMAGENET_DATA,
    IMAGENET_OPTIMISATION,
    IMAGENET_OURS,
    IMAGENET_RUNNING,
    read_imagenet_options,
)
from MetaSemi.core.training import Training
from MetaSemi.imagenet.source import ARCH, RecordImages
from shared.cli import less_memory, run_main

LINE = ("Ep[{epoch}/{epochs}] It[{step}/{length}] Bt {btime:.3f} Dt {dtime:.3f} Loss {loss:.3f} ({loss_avg:.3f}) "
        "Acc1 {acc1:.3f} ({acc1_avg:.3f}) Acc5 {acc5:.3f} ({acc5_avg:.3f}) LR {rate:.3E}")
FLAGS = {
    "data and network": (*IMAGENET_DATA, ARCH),
    "optimisation": IMAGENET_OPTIMISATION,
    "running": IMAGENET_RUNNING,
    "beyond the published flags": IMAGENET_OURS,
}


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    return read_imagenet_options("train_imagenet", __doc__, FLAGS, argv)


@less_memory("--batch-size")
def main() -> None:
    options = parse()
    training = Training(options, RecordImages, unlabeled=False)
    if options.evaluate:
        training.measure()
        return
    for _, rate, batch in training.steps():
        result = supervised_step(training.net, training.optimizer, batch.labeled, batch.labels, rate=rate,
                                 autocast=training.autocast, world=training.world)
        training.log(LINE, result.loss, **figures(result, batch.labels))


def figures(result: StepResult, labels: Tensor) -> dict[str, Tensor]:
    """Return the numbers of a step to log. labels: int64 [n]."""
    first, fifth = accuracy(result.label_logits, labels, (1, min(5, result.label_logits.shape[1])))
    return {"loss": result.label_loss, "acc1": first[0], "acc5": fifth[0]}


if __name__ == "__main__":
    run_main(main)
