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

from MetaSemi.core import options as shared_options
from shared.cli import run_main

LINE = ("Ep[{epoch}/{epochs}] It[{step}/{length}] Bt {btime:.3f} Dt {dtime:.3f} "
        "Lloss: {label_loss:.3f} (avg {label_loss_avg:.3f}) Uloss: {unlabel_loss:.3f} (avg {unlabel_loss_avg:.3f}) "
        "Lacc1: {label_acc1:.3f} (avg {label_acc1_avg:.3f}) Lacc5: {label_acc5:.3f} (avg {label_acc5_avg:.3f}) "
        "Uacc1: {unlabel_acc1:.3f} (avg {unlabel_acc1_avg:.3f}) Uacc5: {unlabel_acc5:.3f} (avg {unlabel_acc5_avg:.3f}) "
        "LR: {rate:.3E} ")


FLAGS = {
    "data and network": shared_options.IMAGENET_DATA,
    "method": (shared_options.ALPHA, shared_options.EPSILON),
    "optimisation": shared_options.IMAGENET_OPTIMISATION,
    "running": shared_options.IMAGENET_RUNNING,
    "beyond the published flags": (*shared_options.META, *shared_options.IMAGENET_OURS),
}


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options of a command line (None: this process's); UserError."""
    return shared_options.read_imagenet_options("train_meta_imagenet", __doc__, FLAGS, argv)


def main() -> None:
    options = parse()
    # These load torch: only once the command line is known to be right.
    from MetaSemi.core.imagenet_training import Training
    from MetaSemi.core.meta import MetaGradient, meta_step

    training = Training(options, unlabeled=True)
    if options.evaluate:
        training.validate()
        return
    meta = MetaGradient(options.epsilon, options.meta_grad == "exact", options.local_meta, options.meta_lr,
                        training.autocast)
    for step, rate, images in training.steps():
        result = meta_step(training.net, training.optimizer, images.labeled, images.labels, images.unlabeled, rate=rate,
                           lam=training.mixing(step), meta=meta, world=training.world)
        training.log(LINE, result.loss, **figures(result, images.labels, images.truth))


def figures(result, labels, truth) -> dict:
    """Return the numbers of a step to log; the label loss is that of the mixed images, the accuracies of pass 1 and 6.

    result: StepResult; labels, truth: int64 [n], of the labelled and of the unlabelled images.
    """
    from MetaSemi.core.meters import accuracy
    from MetaSemi.core.validation import top5

    topk = (1, top5(result.label_logits.shape[1]))
    labeled, unlabeled = accuracy(result.label_logits, labels, topk), accuracy(result.unlabel_logits, truth, topk)
    return {"label_loss": result.interp_loss, "unlabel_loss": result.unlabel_loss, "label_acc1": labeled[0][0],
            "label_acc5": labeled[1][0], "unlabel_acc1": unlabeled[0][0], "unlabel_acc5": unlabeled[1][0]}


if __name__ == "__main__":
    run_main(main)
