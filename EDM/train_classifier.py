"""Train the classifier of noisy images that TDSM needs ("Label-Noise Robust Diffusion Models", openreview HXWTXXtHNl).

    torchrun --standalone --nproc_per_node=1 train_classifier.py --outdir=classifier-runs \\
        --data=datasets/cifar10_sym_40-32x32.zip --cond=1 --arch=ddpmpp --batch 1024

It learns the clean classes from noisy labels by forward correction with a known transition matrix, or together with
the matrix (--precond=edm_vm, VolMinNet). Without --noise_type and --transition the noise is what dataset_tool.py wrote
into dataset.json, else what the name of --data says (..._sym_40-...), else none. The snapshot carries the matrix. The
same command again continues a run that was interrupted.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from EDM.tdsm.noisy_set import Noise, kind_of, noise_of_data, noise_of_flags, open_eval_set, open_noisy_set
from EDM.tdsm.tasks import classifying
from EDM.tdsm.transition import check_labels
from EDM.training import flags as shared_flags
from EDM.training.config import classifier_dictionary
from EDM.training.dataset import TrainingSet
from EDM.training.flags import COUNT
from EDM.training.launch import Script, run
from shared.cli import Bool, Choice, IntList, Option, UserError, parse, run_main

FLAGS = {
    "main options": shared_flags.main_options(
        Choice("ddpmpp", "ncsnpp", "adm"), ["vp", "ve", "edm", "edm_tv", "edm_vm"],
        "must be 1: labels are what is learned"),
    "hyperparameters": shared_flags.HYPERPARAMETERS,
    "performance": shared_flags.PERFORMANCE,
    "files": shared_flags.FILES,
    "label noise": shared_flags.LABEL_NOISE,
    "classifier": (
        Option("--optimizer", Choice("adam", "sgd"), "adam", "Adam, or SGD with momentum 0.9"),
        # Beyond the published command line.
        Option("--classifier", Choice("cnn", "resnet18", "resnet34", "resnet34_64"), None,
               "network in the image", default_help="by the data set"),
        Option("--averaged", Bool, None, "keep the average of --ema in the snapshot", default_help="no"),
        Option("--vm-schedule", IntList(0), None, "VolMinNet: images after which the rate falls, falls again, and the "
               "matrix is fixed", default_help="1500,3000,7500", unit="thousand images"),
        Option("--accuracy-images", COUNT, None, "images to measure the accuracy on, at every tick",
               default_help="500"),
        Option("--eval-data", metavar="ZIP|DIR",
               help="clean-labelled images to measure it on", default_help="of the training set"),
    ),
    "running": shared_flags.RUNNING,
    "schedules": shared_flags.SCHEDULES,
    "noise levels": shared_flags.LEVELS,
}
# Of the networks of train.py; classifiers have no use for them.
ABSENT = ("label_dropout", "num_blocks", "attn_resolutions", "channel_mult_emb")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    vars(flags).update(dict.fromkeys(ABSENT))
    check(flags)
    run(Script(open_noisy_set, options_of, lambda: task_of(flags)), flags)


def check(flags: SimpleNamespace) -> None:
    """Settle whether the matrix is learned; raise UserError for flags that contradict each other."""
    if flags.precond == "edm_tv":
        raise UserError("--precond=edm_tv: a transition matrix that depends on time was never published in working "
                        "form; use --precond=edm_vm, which learns a constant one")
    if flags.precond == "edm_vm":
        if flags.noise_type not in (None, "learn") or flags.transition is not None or flags.noise_rate:
            raise UserError("--precond=edm_vm learns the transition matrix: leave out --noise_type, --noise_rate and "
                            "--transition, or use --precond=edm")
        flags.noise_type, flags.noise_rate = "learn", None
    elif flags.noise_type == "learn" and flags.precond != "edm":
        raise UserError(f"--noise_type=learn goes with --precond=edm, not {flags.precond}: a classifier trained so "
                        "serves train_noise.py with every --precond")
    flags.learned = flags.noise_type == "learn"
    if flags.vm_schedule is not None and (len(flags.vm_schedule) != 3
                                          or sorted(flags.vm_schedule) != flags.vm_schedule):
        raise UserError("--vm-schedule: expected three rising numbers of thousand images, such as 1500,3000,7500")
    if flags.vm_schedule is not None and not flags.learned:
        raise UserError("--vm-schedule belongs to --precond=edm_vm")


def noise_of(flags: SimpleNamespace, dataset: TrainingSet) -> Noise:
    return noise_of_flags(flags, dataset.label_dim) or noise_of_data(flags, dataset.label_dim)


def options_of(flags: SimpleNamespace, dataset: TrainingSet, seed: int) -> dict[str, Any]:
    noise, kind = noise_of(flags, dataset), kind_of(flags)
    if noise.matrix is not None:
        check_labels(noise.matrix, dataset.raw_labels, flags.data)
    open_eval_set(flags, dataset)
    encoder = flags.classifier or encoder_of(kind, dataset)
    if encoder == "cnn" and (flags.arch == "adm" or dataset.resolution % 4):
        if flags.classifier is not None:
            raise UserError("--classifier=cnn needs --arch=ddpmpp or ncsnpp and images whose side is a multiple of 4")
        encoder = "resnet18"
    if flags.arch == "ddpmpp" and kind is not None:
        flags.arch_name = f"ddpmpp_{kind}"  # in the name of the run, as published
    settings = noise.settings()
    if noise.noise_type == "file":
        settings["transition_digest"] = digest_of(noise.matrix)
    edm = SimpleNamespace(**{**vars(flags), "precond": "edm" if flags.learned else flags.precond})
    print(f"label noise: {noise}")
    return classifier_dictionary(edm, dataset.resolution, len(dataset), seed, encoder, flags.learned, settings)


def encoder_of(kind: str | None, dataset: TrainingSet) -> str:
    """Return the network that the paper takes for a data set; for others the one for such images and classes."""
    published = {"mnist": "cnn", "digits": "cnn", "cifar100": "resnet34", "cifar10": "resnet18"}
    if kind in published:
        return published[kind]
    return "resnet34_64" if dataset.resolution >= 64 else "resnet34" if dataset.label_dim >= 100 else "resnet18"


def digest_of(matrix: Any) -> str:
    return hashlib.sha256(matrix.round(6).tobytes()).hexdigest()[:16]


def task_of(flags: SimpleNamespace) -> Any:
    return lambda options, dataset, world: classifying(options, dataset, world, flags, noise_of(flags, dataset))


if __name__ == "__main__":
    run_main(main)
