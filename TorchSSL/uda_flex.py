"""UDA with the thresholds of FlexMatch (Zhang et al. 2021, arXiv 2110.08263): uda.py with --use_flex True.

    python uda_flex.py --c config/uda_flex/uda_flex_cifar10_40_0.yaml
"""
from __future__ import annotations

from functools import partial

from shared.cli import run_main
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train
from TorchSSL.uda import FLAGS, UDA

parse = partial(learner_options, "uda_flex", __doc__, FLAGS, amp=True, seed=0, use_flex=True)

if __name__ == "__main__":
    run_main(lambda: train(parse(), UDA))
