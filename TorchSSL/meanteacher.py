"""Mean Teacher: the prediction follows that of a teacher, whose weights are the moving average of the student's.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017 (arXiv 1703.01780).

    python meanteacher.py --c config/meanteacher/meanteacher_cifar10_40_0.yaml
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
    Option("--ulb_loss_ratio", Float(0), 50.0, "weight of the loss on unlabelled images"),
    Option("--unsup_warm_up", Float(0, 1), 0.4, "fraction of the training in which that weight rises from 0"),
)
parse = partial(learner_options, "meanteacher", __doc__, FLAGS, save_name="meanTeacher", amp=True, seed=0, uratio=1,
                num_labels=4000, num_eval_iter=1000)


class MeanTeacher(Algorithm):
    """The loss of Mean Teacher. Its teacher is the average of weights that the trainer keeps."""

    views = ("weak", "weak")

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        supervised = F.cross_entropy(classify(net, batch.labeled), batch.labels)
        with torch.no_grad(), frozen_batchnorm(self.teacher):
            target = classify(self.teacher, batch.views[0]).softmax(1)
        with frozen_batchnorm(net):
            student = classify(net, batch.views[1])
        unsupervised = squared_difference(student, target)

        ramp = ramp_up(step, self.options.unsup_warm_up, self.options.num_train_iter)
        total = supervised + self.options.ulb_loss_ratio * ramp * unsupervised
        return total, {"train/sup_loss": supervised, "train/unsup_loss": unsupervised, "train/total_loss": total}


if __name__ == "__main__":
    run_main(lambda: train(parse(), MeanTeacher))
