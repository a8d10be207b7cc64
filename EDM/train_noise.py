"""Train a class-conditional diffusion model from noisy labels by transition-aware weighted denoising score matching
(TDSM; "Label-Noise Robust Diffusion Models", openreview HXWTXXtHNl).

    torchrun --standalone --nproc_per_node=8 train_noise.py --outdir=noise-runs \\
        --data=datasets/cifar10_sym_40-32x32.zip --cond=1 --arch=ddpmpp \\
        --cls=/path/to/classifier/network-snapshot-200000.pkl --noise_type=sym --noise_rate=0.4

Without --noise_type and --transition the noise is that of the classifier's training; given flags must agree with it.
The same command again continues an interrupted run.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from EDM import train
from EDM.tdsm.noise import Noise, agreed_noise, open_noisy_set
from EDM.tdsm.tasks import TDSM, classifier_snapshot
from EDM.tdsm.transition import check_labels
from EDM.train import PRECONDITIONINGS, option_dictionary, set_given
from EDM.training import config
from EDM.training.config import COUNT, FRACTION, POSITIVE
from EDM.training.dataset import TrainingSet
from EDM.training.launch import check, join, launch
from EDM.training.snapshots import Snapshot, digest
from shared.cli import Choice, Flag, Option, parse, run_main
from shared.data.images import ImageSet

FLAGS = {
    "main options": config.main_options(Choice("ddpmpp", "ddpmpp_mnist", "ncsnpp", "adm"), ["vp", "ve", "edm"],
                                              "must be 1, since the labels are learned"),
    "hyperparameters": config.HYPERPARAMETERS,
    "performance": config.PERFORMANCE,
    "files": config.FILES,
    "label noise": (
        *config.LABEL_NOISE,
        Option("--cls", metavar="PKL|URL", help="snapshot of the classifier, from train_classifier.py"),
        Option("--tau", FRACTION, 0.01, "leave out classes of smaller weight from an image's mixture"),
        # Beyond the published command line.
        Option("--temp", POSITIVE, 1.0, "temperature of the classifier"),
        Option("--relative-tau", Flag, False, "--tau is in units of 1 / number of classes"),
        Option("--renormalise", Flag, False, "scale the remaining weights to sum 1"),
        Option("--full-gradient", Flag, False, "train all classes of the mixture, not only the label's"),
        Option("--pairs-gpu", COUNT, None, "maximum of (image, class) pairs per GPU in one forward pass",
               default_help="4 x --batch-gpu; on a CPU what its cache holds"),
    ),
    "running": config.RUNNING,
    "schedules": config.SCHEDULES,
    "U-Net": config.UNET,
    "noise levels": config.LEVELS,
}


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    check(flags)

    def plan() -> tuple[TrainingSet, Noise, Snapshot | None, dict[str, Any]]:
        dataset = open_noisy_set(flags)
        classifier = classifier_snapshot(flags.cls, dataset)
        noise = agreed_noise(flags, dataset.label_dim, classifier)
        check_labels(noise.matrix, dataset.raw_labels, flags.data)
        return dataset, noise, classifier, denoiser_dictionary(flags, dataset, noise)

    world, (dataset, noise, classifier, options) = join(flags, plan)
    if world.main:
        print(f"label noise: {noise}")
    launch(options, dataset, partial(TDSM, label_noise=noise, snapshot=classifier), flags, world)


def foresee(flags: SimpleNamespace, images: ImageSet, processes: int) -> int:
    """See train.py."""
    return train.foresee(flags, images, processes)


def denoiser_dictionary(flags: SimpleNamespace, dataset: TrainingSet, noise: Noise) -> dict[str, Any]:
    """Return the published option dictionary; see `option_dictionary` of train.py."""
    options = option_dictionary(SimpleNamespace(**{**vars(flags), "label_dropout": None}), dataset)
    options["loss_kwargs"].update(class_name=f"training.loss.{PRECONDITIONINGS[flags.precond]}NoiseLoss",
                                  **noise.settings(), tau=flags.tau, temp=flags.temp)
    set_given(options["loss_kwargs"], relative_tau=flags.relative_tau or None, renormalise=flags.renormalise or None,
              full_gradient=flags.full_gradient or None, label_dropout=flags.label_dropout or None,
              classifier=None if flags.cls is None else digest(flags.cls)[:16])
    set_given(options, cls=flags.cls, pairs_gpu=flags.pairs_gpu)
    return options


if __name__ == "__main__":
    run_main(main)
