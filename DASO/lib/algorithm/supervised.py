"""Learning from the labelled images alone: supervised training, and cRT, which trains its classifier again.

MODEL.LOSS.* choose class-balanced weights or LDAM after a warm-up, one-vs-all and focal losses;
ALGORITHM.LOGIT_ADJUST adjusts the logits (Menon et al., ICLR 2021); DATASET.SAMPLER_NAME re-samples.
"""
from __future__ import annotations

from pathlib import Path

import torch

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Step, Training
from DASO.lib.losses import adjusted
from DASO.lib.models.ema import as_counters
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint, weights_in

CHECKPOINT = "model_final.pth.tar"


class Supervised(Algorithm):
    views = ()
    keeps_average = False
    evaluates_average = False

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        logits = adjusted(self.model(batch.labelled), self.cfg, self.setting.prior)
        return Step({"loss_cls": self.labelled_loss(logits, batch.labels, it)}, logits)


class CRT(Algorithm):
    """The classifier trained again on a fixed encoder, that of the finished run ALGORITHM.CRT.TARGET_DIR.

    Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020 (arXiv 1910.09217),
    section 4.1; DATASET.SAMPLER_NAME ClassAwareSampler draws the classes. The encoder gets no gradient; its batch
    statistics go on moving, as published.
    """

    views = ()
    evaluates_average = False

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        with torch.no_grad():
            features = self.model.encoder(batch.labelled)
        logits = self.model.classifier(features)
        return Step({"loss_cls": self.labelled_loss(logits, batch.labels, it)}, logits)

    def begin(self, training: Training) -> None:
        """Give the encoder of the run to the student, and that of its average, with the classifier, to the teacher."""
        folder = self.cfg.ALGORITHM.CRT.TARGET_DIR
        if not folder:
            raise UserError("ALGORITHM.CRT.TARGET_DIR: name the folder of the run whose encoder is to be used")
        path = Path(folder) / CHECKPOINT
        if not path.is_file():
            raise UserError(f"ALGORITHM.CRT.TARGET_DIR: {path} does not exist; name the folder of a finished run")
        saved, own = read_checkpoint(path), self.model.state_dict()
        student = as_counters(weights_in(saved, "model", path))
        average = as_counters(weights_in(saved, "ema_model", path)) if saved.get("ema_model") else student
        encoder = {name: value for name, value in student.items() if name.startswith("encoder.")}
        kept = {name: value for name, value in average.items() if name.startswith(("encoder.", "classifier."))}
        if not encoder:
            raise UserError(f"{path}: no tensor of it is named encoder.*; it is not a network of main.py")
        try:
            self.model.load_state_dict({**own, **encoder})
            self.teacher.load_state_dict({**own, **kept})
        except RuntimeError as error:
            raise UserError(f"{path}: its encoder does not fit this network: "
                            f"{' '.join(str(error).split())[:200]}") from None
