"""Convert images to the ZIP or folder that EDM trains on, if wanted with wrong labels; `--help` tells how."""
from __future__ import annotations

from typing import Any

import click

from EDM import dataset_tool_cli as dataset_tool
from shared.cli import run_main

HELP = dataset_tool.main.help + """

    Label noise is for experiments with wrong labels. dataset.json then also holds the clean labels, the flips, the
    transition matrix and the realised one.

    \b
    python dataset_tool.py --source=downloads/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10_sym_40-32x32.zip --noise_type=sym --noise_rate=0.4
"""


@click.command(help=HELP, context_settings=dataset_tool.main.context_settings)
@click.option("--noise_type", type=click.Choice(["sym", "asym"]),
              help="Flip labels: to any other class, or to one similar class.")
@click.option("--noise_rate", type=float, metavar="FLOAT", help="Probability of a flip, from 0 to below 1.")
@click.option("--transition", metavar="FILE", help="Flip labels by this matrix instead: .json or .npy, row = clean "
              "class.")
@click.option("--dataset", metavar="NAME", help="mnist, cifar10, cifar100 or digits, for --noise_type.  "
              "[default: by the name of the source or --dest]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Seed of the flips.  [default: 0]")
def main(noise_type: str | None, noise_rate: float | None, transition: str | None, dataset: str | None,
         seed: int | None, **given: Any) -> None:
    from EDM.convert_dataset import convert
    from EDM.tdsm.noise import plan_noise

    convert(**given, relabel=plan_noise(noise_type, noise_rate, transition, dataset, seed, given["source"],
                                        given["dest"]))


main.params[:0] = dataset_tool.main.params

if __name__ == "__main__":
    run_main(main)
