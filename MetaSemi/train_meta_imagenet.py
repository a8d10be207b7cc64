"""MetaSemi on ImageNet with a tenth of the labels, from the record files that imagenet/im2rec.py writes.

Zhang et al., "Semi-Supervised Learning with Meta-Gradient", AISTATS 2021 (arXiv 2007.03966), section 4.3.

    torchrun --nproc_per_node=8 train_meta_imagenet.py -a resnet18 --data /path/to/rec \\
        --save-path results/imagenet-meta --batch-size 64 --alpha 1.0

Each step corrects the pseudo-labels of its unlabelled images by the meta-gradient (meta.py), then descends the mix-up
loss and the squared distance to the pseudo-labels. Starts alone, under torchrun, and under torch.distributed.launch.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor

from MetaSemi.core.evaluation import accuracy
from MetaSemi.core.meta import MetaGradient, StepResult, meta_step
from MetaSemi.core.options import (
    ALPHA,
    EPSILON,
    IMAGENET_DATA,
    IMAGENET_OPTIMISATION,
    IMAGENET_OURS,
    IMAGENET_RUNNING,
    META,
    read_imagenet_options,
)
from MetaSemi.core.training import Training
from MetaSemi.imagenet.source import ARCH, RecordImages
from shared.cli import less_memory, run_main

LINE = ("Ep[{epoch}/{epochs}] It[{step}/{length}] Bt {btime:.3f} Dt {dtime:.3f} "
        "Lloss: {label_loss:.3f} (avg {label_loss_avg:.3f}) Uloss: {unlabel_loss:.3f} (avg {unlabel_loss_avg:.3f}) "
        "Lacc1: {label_acc1:.3f} (avg {label_acc1_avg:.3f}) Lacc5: {label_acc5:.3f} (avg {label_acc5_avg:.3f}) "
        "Uacc1: {unlabel_acc1:.3f} (avg {unlabel_acc1_avg:.3f}) Uacc5: {unlabel_acc5:.3f} (avg {unlabel_acc5_avg:.3f}) "
        "LR: {rate:.3E} ")
FLAGS = {
    "data and network": (*IMAGENET_DATA, ARCH),
    "method": (ALPHA, EPSILON),
    "optimisation": IMAGENET_OPTIMISATION,
    "running": IMAGENET_RUNNING,
    "beyond the published flags": (*META, *IMAGENET_OURS),
}


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    return read_imagenet_options("train_meta_imagenet", __doc__, FLAGS, argv)


@less_memory("--batch-size")
def main() -> None:
    options = parse()
    training = Training(options, RecordImages, unlabeled=True)
    if options.evaluate:
        training.measure()
        return
    meta = MetaGradient(options.epsilon, options.meta_grad == "exact", options.local_meta, options.meta_lr,
                        training.autocast)
    for step, rate, batch in training.steps():
        result = meta_step(training.net, training.optimizer, batch.labeled, batch.labels, batch.unlabeled, rate=rate,
                           lam=training.mixing(step), meta=meta, world=training.world)
        training.log(LINE, result.loss, **figures(result, batch.labels, batch.truth))


def figures(result: StepResult, labels: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return the numbers of a step to log; the label loss is that of the mixed images, the accuracies of pass 1 and 6.

    labels, truth: int64 [n], of the labelled and of the unlabelled images.
    """
    topk = (1, min(5, result.label_logits.shape[1]))
    labeled, unlabeled = accuracy(result.label_logits, labels, topk), accuracy(result.unlabel_logits, truth, topk)
    return {"label_loss": result.interp_loss, "unlabel_loss": result.unlabel_loss, "label_acc1": labeled[0][0],
            "label_acc5": labeled[1][0], "unlabel_acc1": unlabeled[0][0], "unlabel_acc5": unlabeled[1][0]}


if __name__ == "__main__":
    run_main(main)
