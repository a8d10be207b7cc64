"""Train a class-conditional diffusion model from noisy labels by transition-aware weighted denoising score matching
(TDSM; "Label-Noise Robust Diffusion Models", openreview HXWTXXtHNl).

    torchrun --standalone --nproc_per_node=8 train_noise.py --outdir=noise-runs \\
        --data=datasets/cifar10_sym_40-32x32.zip --cond=1 --arch=ddpmpp \\
        --cls=/path/to/classifier/network-snapshot-200000.pkl --noise_type=sym --noise_rate=0.4

Without --noise_type and --transition the noise is what the classifier was trained for; given flags must agree with
it. The same command again continues a run that was interrupted.
"""
from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from EDM.training import flags as shared_flags
from EDM.training.flags import AT_LEAST_ONE, POSITIVE, SHARE, option
from EDM.training.launch import Script, run
from shared.cli import run_main

if TYPE_CHECKING:
    from EDM.training.dataset import TrainingSet

OWN = [
    *shared_flags.LABEL_NOISE,
    option("--cls", metavar="PKL|URL", type=str, help="Snapshot of the classifier, from train_classifier.py"),
    option("--tau", type=SHARE, default=0.01, help="Classes of smaller weight are left out of an image's mixture"),
    # Beyond the published command line.
    option("--temp", type=POSITIVE, default=1.0, help="Temperature of the classifier"),
    option("--relative-tau", is_flag=True, help="--tau is in units of 1 / number of classes"),
    option("--renormalise", is_flag=True, help="Let the weights that are left add up to 1"),
    option("--full-gradient", is_flag=True, help="Train on all classes of the mixture, not the label alone"),
    option("--pairs-gpu", type=AT_LEAST_ONE,
           help="Most (image, class) pairs per GPU at once  [4 x --batch-gpu; on a CPU what its cache holds]")]


@click.command(help=__doc__.replace("\n    torchrun", "\n    \b\n    torchrun"))
@shared_flags.with_options(
    shared_flags.main_options(click.Choice(["ddpmpp", "ddpmpp_mnist", "ncsnpp", "adm"]), ["vp", "ve", "edm"],
                              "Must be 1: labels are what is learned"),
    shared_flags.HYPERPARAMETERS, shared_flags.PERFORMANCE, shared_flags.FILES, OWN, shared_flags.RUNNING,
    shared_flags.SCHEDULES, shared_flags.UNET, shared_flags.LEVELS, [shared_flags.RESUME_SUB])
@click.pass_context
def main(context: click.Context, **given: Any) -> None:
    flags = SimpleNamespace(**given)
    run(Script(open_set, options_of, lambda: task_of(flags)), flags, context)


def open_set(flags: SimpleNamespace) -> TrainingSet:
    from EDM.tdsm.noisy_set import open_noisy_set

    return open_noisy_set(flags)


def options_of(flags: SimpleNamespace, dataset: TrainingSet, seed: int) -> dict[str, Any]:
    from EDM.tdsm.noisy_set import agreed_noise
    from EDM.tdsm.tasks import classifier_snapshot
    from EDM.tdsm.transition import check_labels
    from EDM.training.config import denoiser_dictionary
    from EDM.training.snapshots import digest

    noise = agreed_noise(flags, dataset.label_dim, classifier_snapshot(flags.cls, dataset))
    check_labels(noise.matrix, dataset.raw_labels, flags.data)
    print(f"label noise: {noise}")
    return denoiser_dictionary(flags, dataset.resolution, len(dataset), seed, noise.settings(),
                               None if flags.cls is None else digest(flags.cls)[:16])


def task_of(flags: SimpleNamespace) -> Any:
    from EDM.tdsm.tasks import denoising_from_noisy_labels

    return lambda options, dataset, world: denoising_from_noisy_labels(options, dataset, world, flags)


if __name__ == "__main__":
    run_main(main)
