"""Train a diffusion model of "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364).

    python train.py --outdir=training-runs --data=datasets/cifar10-32x32.zip --cond=1 --arch=ddpmpp
    torchrun --standalone --nproc_per_node=4 train.py --outdir=training-runs --data=... --cond=1 --arch=ddpmpp

The same command again continues a run that was interrupted.
"""
from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from EDM.training import flags as shared_flags
from EDM.training.launch import Script, open_data, run
from shared.cli import run_main

if TYPE_CHECKING:
    from EDM.training.dataset import TrainingSet


@click.command(help=__doc__.split("\n\n    python")[0].strip())
@shared_flags.with_options(
    shared_flags.main_options(shared_flags.ArchChoice(["ddpmpp", "ncsnpp", "adm"], ["ddpmpp_mnist"]),
                              ["vp", "ve", "edm"], "Train a class-conditional model"),
    shared_flags.HYPERPARAMETERS, shared_flags.PERFORMANCE, shared_flags.FILES, shared_flags.RUNNING,
    shared_flags.SCHEDULES, shared_flags.UNET, shared_flags.LEVELS, [shared_flags.RESUME_SUB])
@click.pass_context
def main(context: click.Context, **given: Any) -> None:
    run(Script(open_set, options_of, make_task), SimpleNamespace(**given), context)


def open_set(flags: SimpleNamespace) -> TrainingSet:
    return open_data(flags.data, flags.cond, flags.xflip)


def options_of(flags: SimpleNamespace, dataset: TrainingSet, seed: int) -> dict[str, Any]:
    from EDM.training.config import option_dictionary

    return option_dictionary(flags, dataset.resolution, len(dataset), seed)


def make_task() -> Any:
    from EDM.training.training_loop import denoising

    return denoising


if __name__ == "__main__":
    run_main(main)
