"""Pi-model: two weak views of an image get the same prediction.

Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017 (arXiv 1610.02242).

    python pimodel.py --c config/pimodel/pimodel_cifar10_40_0.yaml
"""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import Float, Option, run_main
from TorchSSL.core.algorithm import Algorithm, Batch, classify, frozen_batchnorm, ramp_up, squared_difference
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--ulb_loss_ratio", Float(0), 10.0, "weight of the loss on unlabelled images"),
    Option("--unsup_warmup_pos", Float(0, 1), 0.4, "fraction of the training in which that weight rises from 0"),
)
parse = partial(learner_options, "pimodel", __doc__, FLAGS, seed=0, uratio=1, num_labels=4000, num_eval_iter=1000)


class PiModel(Algorithm):
    """The loss of the Pi-model; it has no state."""

    views = ("weak", "weak")

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        supervised = F.cross_entropy(classify(net, batch.labeled), batch.labels)
        with frozen_batchnorm(net):
            first = classify(net, batch.views[0])
            with torch.no_grad():
                second = classify(net, batch.views[1]).softmax(1)
        unsupervised = squared_difference(first, second)

        ramp = ramp_up(step, self.options.unsup_warmup_pos, self.options.num_train_iter)
        total = supervised + self.options.ulb_loss_ratio * ramp * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total}


if __name__ == "__main__":
    run_main(lambda: train(parse(), PiModel))
