"""Pseudo-Label with the thresholds of FlexMatch (Zhang et al. 2021, arXiv 2110.08263): pseudolabel.py with --use_flex
True.

    python pseudolabel_flex.py --c config/pseudolabel_flex/pseudolabel_flex_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from shared.cli import run_main
from TorchSSL.core.options import parse_options
from TorchSSL.pseudolabel import FLAGS, PseudoLabel


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("pseudolabel_flex", __doc__, FLAGS, argv, seed=0, uratio=1, use_flex=True)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train

    train(options, PseudoLabel)


if __name__ == "__main__":
    run_main(main)
