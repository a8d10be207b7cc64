"""FreeMatch with its fairness term, as in the paper: freematch.py with --ent_loss_ratio above 0.

Wang et al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", ICLR 2023 (arXiv 2205.07246).

    python freematch_entropy.py --c config/freematch_entropy/freematch_entropy_cifar10_40_0.yaml
"""
from __future__ import annotations

from functools import partial

from shared.cli import run_main
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train
from TorchSSL.freematch import FLAGS, FreeMatch

parse = partial(learner_options, "freematch_entropy", __doc__, FLAGS, save_name="freematch", ent_loss_ratio=0.1)

if __name__ == "__main__":
    run_main(lambda: train(parse(), FreeMatch))
