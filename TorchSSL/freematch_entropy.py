"""FreeMatch with its fairness term, as in the paper: freematch.py with --ent_loss_ratio above 0.

Wang et al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", ICLR 2023 (arXiv 2205.07246).

    python freematch_entropy.py --c config/freematch_entropy/freematch_entropy_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from shared.cli import run_main
from TorchSSL.core.options import parse_options
from TorchSSL.freematch import FLAGS, FreeMatch


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("freematch_entropy", __doc__, FLAGS, argv, save_name="freematch", ent_loss_ratio=0.1)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train

    train(options, FreeMatch)


if __name__ == "__main__":
    run_main(main)
