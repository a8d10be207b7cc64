"""The supervised baseline of MetaSemi on ImageNet: cross-entropy of the labelled tenth alone.

    torchrun --nproc_per_node=4 train_imagenet.py -a resnet18 --data /path/to/rec \\
        --save-path results/imagenet-baseline --batch-size 128

Starts alone, under torchrun, and under torch.distributed.launch.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from MetaSemi.core import options as shared_options
from shared.cli import run_main

LINE = ("Ep[{epoch}/{epochs}] It[{step}/{length}] Bt {btime:.3f} Dt {dtime:.3f} Loss {loss:.3f} ({loss_avg:.3f}) "
        "Acc1 {acc1:.3f} ({acc1_avg:.3f}) Acc5 {acc5:.3f} ({acc5_avg:.3f}) LR {rate:.3E}")


FLAGS = {
    "data and network": shared_options.IMAGENET_DATA,
    "optimisation": shared_options.IMAGENET_OPTIMISATION,
    "running": shared_options.IMAGENET_RUNNING,
    "beyond the published flags": shared_options.IMAGENET_OURS,
}


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    return shared_options.read_imagenet_options("train_imagenet", __doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    # These load torch: only once the command line is known to be right.
    from MetaSemi.core.imagenet_training import Training
    from MetaSemi.core.meta import supervised_step

    training = Training(options, unlabeled=False)
    if options.evaluate:
        training.validate()
        return
    for _, rate, images in training.steps():
        result = supervised_step(training.net, training.optimizer, images.labeled, images.labels, rate=rate,
                                 autocast=training.autocast, world=training.world)
        training.log(LINE, result.loss, **figures(result, images.labels))


def figures(result, labels) -> dict:
    """Return the numbers of a step to log. result: StepResult; labels: int64 [n]."""
    from MetaSemi.core.meters import accuracy
    from MetaSemi.core.validation import top5

    first, fifth = accuracy(result.label_logits, labels, (1, top5(result.label_logits.shape[1])))
    return {"loss": result.label_loss, "acc1": first[0], "acc5": fifth[0]}


if __name__ == "__main__":
    run_main(main)
