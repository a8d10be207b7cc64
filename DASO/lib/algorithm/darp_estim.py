"""DARP_ESTIM: supervised training that estimates the unlabelled class counts, which DARP needs.

Kim et al., NeurIPS 2020 (arXiv 2007.08844), appendix: the confusion of held-out labelled images explains the sum of the
predictions on unlabelled ones (Lipton et al., ICML 2018, arXiv 1802.03916, equation 4).
"""
from __future__ import annotations

import numpy as np
import torch

from DASO.lib.algorithm.darp import estimate_counts, estimate_name, soft_confusion
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, Training
from DASO.lib.config.config import Config
from shared.cli import UserError
from shared.training.files import atomic

FILE = "estim.npy"


class DARPEstimate(Algorithm):
    """At every evaluation the student makes an estimate. State: `total` [K], the sum of those accepted, and `accepted`.

    One is accepted if no class count is negative and the confusion is conditioned better than
    ALGORITHM.DARP_ESTIM.THRESH_COND; their mean is written to estim.npy in the run's folder.
    """

    state = ("total", "accepted")
    evaluates_average = False

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.total = torch.zeros(setting.num_classes, dtype=torch.float64, device=setting.device)
        self.accepted = 0

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        logits = self.model(batch.labelled)
        return Step({"loss_cls": self.labelled_loss(logits, batch.labels, it)}, logits)

    def begin(self, training: Training) -> None:
        if training.valid is None:
            raise UserError("DARP_ESTIM compares predictions with held-out labels: set DATASET.NUM_VALID or "
                            "ALGORITHM.DARP_ESTIM.PER_CLASS_VALID_SAMPLES above 0")

    @torch.no_grad()
    def evaluated(self, training: Training, it: int) -> None:
        """Estimate. The last, incomplete batch of unlabelled images is left out, as published."""
        size = self.cfg.SOLVER.IMS_PER_BATCH * self.cfg.SOLVER.UNLABELED_BATCH_RATIO
        pools = training.valid, training.batches.unlabelled
        valid, unlabelled = (training.predict(pool).softmax(1) for pool in pools)
        whole = len(unlabelled) // size * size or len(unlabelled)
        confusion = soft_confusion(valid, training.valid.labels)
        counts, condition = estimate_counts(confusion, unlabelled[:whole].sum(0))
        if bool((counts >= 0).all()) and condition < self.cfg.ALGORITHM.DARP_ESTIM.THRESH_COND:
            self.total, self.accepted = self.total + counts, self.accepted + 1

    def finish(self, training: Training) -> None:
        """Write the estimate."""
        if not self.accepted:
            training.run.log.print("no estimate of the unlabelled class counts was accepted: train longer, or raise "
                               "ALGORITHM.DARP_ESTIM.THRESH_COND")
            return
        estimate = (self.total / self.accepted).cpu().numpy()
        if self.setting.world.main:
            with atomic(training.folder / FILE) as file:
                np.save(file, estimate)
        training.run.log.print(f"estimated unlabelled class counts: {np.round(estimate, 1).tolist()}")
        tail = self.cfg.long_tail
        if tail is not None:
            data = self.cfg.DATASET
            name = estimate_name(data.NAME, (tail.NUM_LABELED_HEAD, tail.IMB_FACTOR_L),
                                 (tail.NUM_UNLABELED_HEAD, tail.IMB_FACTOR_UL), data.REVERSE_UL_DISTRIBUTION)
            training.run.log.print(f"for DARP: copy {training.folder / FILE} to {self.cfg.ALGORITHM.DARP.EST}/{name}")
