"""Mean Teacher and Pseudo-Label: learning the predictions of an average, or the network's own ones."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.algorithm.daso import Semantics
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import cross_entropy


class MeanTeacher(Algorithm):
    """The student learns the averaged network's probabilities of another view.

    Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017 (arXiv 1703.01780). With
    ALGORITHM.MEANTEACHER.APPLY_DASO the teacher's probabilities are blended with the semantic ones of DASO.
    """

    state = ("semantics",)

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.semantics = Semantics(cfg, setting) if cfg.ALGORITHM.MEANTEACHER.APPLY_DASO else None

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        first, second = batch.views
        labelled, student = self.model(torch.cat([batch.labelled, first])).split(batch.sizes[:2])
        target, kinds = self.teach(batch, second, it)
        ramp = self.ramp_up(it)
        difference = F.mse_loss(student.softmax(1), target)
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": ramp * self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * difference}
        return Step(losses, labelled, kinds, log={"cons_rampup_coeff": ramp})

    @torch.no_grad()
    def teach(self, batch: Batch, images: Tensor, it: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the target probabilities [B_u, K] of images, and their pseudo-labels."""
        if self.semantics is None:
            return self.teacher(images).softmax(1), {}
        labelled, features = self.teacher.encoder(torch.cat([batch.labelled, images])).split(batch.sizes[:2])
        self.semantics.push(labelled, batch.labels)
        linear = self.teacher.classifier(features).softmax(1)
        target, semantic = self.semantics.blend(linear, features, it)
        return target, self.semantics.count(linear, semantic, target, it)


class PseudoLabel(Algorithm):
    """The confident prediction on a view is the label of that same view.

    Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", 2013.
    """

    views = ("weak",)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        labelled, weak = self.model(batch.images).split(batch.sizes)
        label, mask = self.confident(weak.detach().softmax(1))
        ramp = self.ramp_up(it)
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "loss_cons": ramp * self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * cross_entropy(weak, label, mask)}
        return Step(losses, labelled, {"main": label}, mask, {"cons_rampup_coeff": ramp})
