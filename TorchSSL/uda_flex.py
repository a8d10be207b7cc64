"""UDA with the thresholds of FlexMatch (Zhang et al. 2021, arXiv 2110.08263): uda.py with --use_flex True.

    python uda_flex.py --c config/uda_flex/uda_flex_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from shared.cli import run_main
from TorchSSL.core.options import parse_options
from TorchSSL.uda import FLAGS, UDA


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("uda_flex", __doc__, FLAGS, argv, amp=True, seed=0, use_flex=True)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train

    train(options, UDA)


if __name__ == "__main__":
    run_main(main)
