"""Pseudo-Label with the thresholds of FlexMatch (Zhang et al. 2021, arXiv 2110.08263): pseudolabel.py --use_flex True.

    python pseudolabel_flex.py --c config/pseudolabel_flex/pseudolabel_flex_cifar10_40_0.yaml
"""
from __future__ import annotations

from functools import partial

from shared.cli import run_main
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train
from TorchSSL.pseudolabel import FLAGS, PseudoLabel

parse = partial(learner_options, "pseudolabel_flex", __doc__, FLAGS, seed=0, uratio=1, use_flex=True)

if __name__ == "__main__":
    run_main(lambda: train(parse(), PseudoLabel))
