"""Train the classifier of noisy images that TDSM needs ("Label-Noise Robust Diffusion Models", openreview HXWTXXtHNl).

    torchrun --standalone --nproc_per_node=1 train_classifier.py --outdir=classifier-runs \\
        --data=datasets/cifar10_sym_40-32x32.zip --cond=1 --arch=ddpmpp --batch 1024

It learns the clean classes from noisy labels by forward correction with a known transition matrix, or together with
the matrix (--precond=edm_vm, VolMinNet). Without --noise_type and --transition the noise is that of dataset.json by
dataset_tool.py, else that in the name of --data (..._sym_40-...), else none. The snapshot carries the matrix. The same
command again continues an interrupted run.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from EDM.tdsm.noise import Noise, kind_of, noise_of_data, noise_of_flags, open_eval_set, open_noisy_set
from EDM.tdsm.tasks import NoisyClassification
from EDM.tdsm.transition import check_labels
from EDM.train import AUGMENT_DIM, PRECONDITIONINGS, option_dictionary, set_given
from EDM.training import config
from EDM.training.config import COUNT, batch_rounds
from EDM.training.dataset import TrainingSet
from EDM.training.launch import check, join, launch
from shared.cli import Bool, Choice, IntList, Option, UserError, parse, run_main
from shared.data.images import ImageSet

FLAGS = {
    "main options": config.main_options(
        Choice("ddpmpp", "ncsnpp", "adm"), ["vp", "ve", "edm", "edm_tv", "edm_vm"],
        "must be 1, since the labels are learned"),
    "hyperparameters": config.HYPERPARAMETERS,
    "performance": config.PERFORMANCE,
    "files": config.FILES,
    "label noise": config.LABEL_NOISE,
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
    "running": config.RUNNING,
    "schedules": config.SCHEDULES,
    "noise levels": config.LEVELS,
}
# Of the networks of train.py; classifiers have no use for them.
ABSENT = ("label_dropout", "num_blocks", "attn_resolutions", "channel_mult_emb")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    vars(flags).update(dict.fromkeys(ABSENT))
    check_noise(flags)
    check(flags)

    def plan() -> tuple[TrainingSet, Noise, TrainingSet | None, dict[str, Any]]:
        dataset = open_noisy_set(flags)
        noise = noise_of_flags(flags, dataset.label_dim) or noise_of_data(flags, dataset.label_dim)
        if noise.matrix is not None:
            check_labels(noise.matrix, dataset.raw_labels, flags.data)
        test = open_eval_set(flags, dataset)
        return dataset, noise, test, classifier_dictionary(flags, dataset, noise)

    world, (dataset, noise, test, options) = join(flags, plan)
    if world.main:
        print(f"label noise: {noise}")
    method = partial(NoisyClassification, label_noise=noise, data=flags.data, test=test)
    launch(options, dataset, method, flags, world)


def foresee(flags: SimpleNamespace, images: ImageSet, processes: int) -> int:
    """See train.py; the files of a classifier are small."""
    check_noise(flags)
    check(flags)
    batch_rounds(flags.batch, flags.batch_gpu, processes)
    return 0


def check_noise(flags: SimpleNamespace) -> None:
    """Decide whether the matrix is learned; raise UserError for contradicting flags."""
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
    flags.levels = "edm" if flags.learned else flags.precond
    if flags.vm_schedule is not None and (len(flags.vm_schedule) != 3
                                          or sorted(flags.vm_schedule) != flags.vm_schedule):
        raise UserError("--vm-schedule: expected three rising numbers of thousand images, such as 1500,3000,7500")
    if flags.vm_schedule is not None and not flags.learned:
        raise UserError("--vm-schedule belongs to --precond=edm_vm")


# The classifiers' networks by --arch of train.py ("Label-Noise Robust Diffusion Models", Na et al., ICLR 2024).
NETWORKS: dict[str, dict[str, Any]] = {
    "ddpmpp": dict(model_type="ClassifierSong", embedding_type="positional", decoder_type="standard"),
    "ncsnpp": dict(model_type="ClassifierSong", embedding_type="fourier", channel_mult_noise=2),
    "adm": dict(model_type="ClassifierDhariwal", model_channels=192, channel_mult=[1, 2, 3, 4]),
}


def classifier_dictionary(flags: SimpleNamespace, dataset: TrainingSet, noise: Noise) -> dict[str, Any]:
    """Return the published option dictionary; see `option_dictionary` of train.py."""
    options = option_dictionary(SimpleNamespace(**{**vars(flags), "precond": flags.levels}), dataset)
    kind, dataset_kind = PRECONDITIONINGS[flags.levels], kind_of(flags)
    if flags.arch == "ddpmpp" and dataset_kind is not None:
        flags.arch_name = f"ddpmpp_{dataset_kind}"  # in the name of the run, as published
    network, encoder = dict(NETWORKS[flags.arch]), encoder_of(flags, dataset_kind, dataset)
    if encoder == "cnn":
        network["model_type"], encoder = "ClassifierSong_MNIST", "standard"
    network["encoder_type"] = encoder
    set_given(network, model_channels=flags.cbase, augment_dim=AUGMENT_DIM if flags.augment else None,
              sigma_data=flags.sigma_data)
    network["class_name"] = f"training.networks.{kind}Precond_classifier" + "_with_transition_matrix" * flags.learned
    options["network_kwargs"] = dict(network, dropout=flags.dropout, use_fp16=flags.fp16)

    name = f"{kind}ClassifierWithVMLoss" if flags.learned else f"{kind}ClassifierLoss"
    options["loss_kwargs"].update(class_name=f"training.loss.{name}", **noise.settings())
    if noise.noise_type == "file":
        digest = hashlib.sha256(noise.matrix.round(6).tobytes()).hexdigest()
        options["loss_kwargs"]["transition_digest"] = digest[:16]
    if flags.optimizer == "sgd":
        options["optimizer_kwargs"] = dict(class_name="torch.optim.SGD", lr=flags.lr, momentum=0.9, weight_decay=0)
    set_given(options, averaged=flags.averaged or None, accuracy_images=flags.accuracy_images,
              eval_data=flags.eval_data, vm_schedule_kimg=flags.vm_schedule if flags.learned else None)
    return options


def encoder_of(flags: SimpleNamespace, kind: str | None, dataset: TrainingSet) -> str:
    """Return --classifier; by default the paper's network for the data set, or else one for such images and
    classes."""
    published = {"mnist": "cnn", "digits": "cnn", "cifar100": "resnet34", "cifar10": "resnet18"}
    by_size = "resnet34_64" if dataset.resolution >= 64 else "resnet34" if dataset.label_dim >= 100 else "resnet18"
    encoder = flags.classifier or published.get(kind, by_size)
    if encoder == "cnn" and (flags.arch == "adm" or dataset.resolution % 4):
        if flags.classifier is not None:
            raise UserError("--classifier=cnn needs --arch=ddpmpp or ncsnpp and images whose side is a multiple of 4")
        return "resnet18"
    return encoder


if __name__ == "__main__":
    run_main(main)
