"""Train a diffusion model of "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364).

    python train.py --outdir=training-runs --data=datasets/cifar10-32x32.zip --cond=1 --arch=ddpmpp
    torchrun --standalone --nproc_per_node=4 train.py --outdir=training-runs --data=... --cond=1 --arch=ddpmpp

The same command again continues a run that was interrupted.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from EDM.training import flags as shared_flags
from EDM.training.config import option_dictionary
from EDM.training.dataset import TrainingSet
from EDM.training.launch import Script, open_data, run
from EDM.training.training_loop import denoising
from shared.cli import Choice, parse, run_main

FLAGS = {
    "main options": shared_flags.main_options(
        Choice("ddpmpp", "ncsnpp", "adm", further=["ddpmpp_mnist"]), ["vp", "ve", "edm"],
        "train a class-conditional model"),
    "hyperparameters": shared_flags.HYPERPARAMETERS,
    "performance": shared_flags.PERFORMANCE,
    "files": shared_flags.FILES,
    "running": shared_flags.RUNNING,
    "schedules": shared_flags.SCHEDULES,
    "U-Net": shared_flags.UNET,
    "noise levels": shared_flags.LEVELS,
}


def main(argv: Sequence[str] | None = None) -> None:
    run(Script(open_set, options_of, lambda: denoising), parse(__doc__, FLAGS, argv))


def open_set(flags: SimpleNamespace) -> TrainingSet:
    return open_data(flags.data, flags.cond, flags.xflip)


def options_of(flags: SimpleNamespace, dataset: TrainingSet, seed: int) -> dict[str, Any]:
    return option_dictionary(flags, dataset.resolution, len(dataset), seed)


if __name__ == "__main__":
    run_main(main)
