"""cRT: the classifier trained again, on a fixed encoder, mostly with classes drawn equally often.

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020 (arXiv 1910.09217),
section 4.1. The encoder is that of ALGORITHM.CRT.TARGET_DIR, the folder of a finished run;
DATASET.SAMPLER_NAME ClassAwareSampler draws the classes.
"""
from __future__ import annotations

from pathlib import Path

import torch

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Step, Training
from DASO.lib.models.ema import PREFIX, as_counters
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint

CHECKPOINT = "model_final.pth.tar"


class CRT(Algorithm):
    """Evaluates the student. The encoder gets no gradient; its batch statistics go on moving, as published."""

    evaluates_average = False

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        with torch.no_grad():
            features = self.model.encoder(batch.labelled)
        logits = self.model.classifier(features)
        return Step({"loss_cls": self.labelled_loss(logits, batch.labels, it)}, logits)

    def begin(self, training: Training) -> None:
        """Take over the encoder: the student's into the student, the average's, with its classifier, into the average.
        """
        folder = self.cfg.ALGORITHM.CRT.TARGET_DIR
        if not folder:
            raise UserError("ALGORITHM.CRT.TARGET_DIR: name the folder of the run whose encoder is to be used")
        path = Path(folder) / CHECKPOINT
        if not path.is_file():
            raise UserError(f"ALGORITHM.CRT.TARGET_DIR: {path} does not exist; name the folder of a finished run")
        saved = read_checkpoint(path)
        if not isinstance(saved.get("model"), dict):
            raise UserError(f"{path}: it holds no model; name the folder of a finished run of main.py")
        student = as_counters(saved["model"])
        average = as_counters(saved.get("ema_model") or saved["model"])
        own = self.model.state_dict()
        encoder = {name: value for name, value in student.items() if name.startswith("encoder.")}
        kept = {name: value for name, value in average.items() if name.startswith(("encoder.", "classifier."))}
        try:
            self.model.load_state_dict({**own, **encoder})
            self.teacher.load_state_dict({**own, **kept})
        except RuntimeError as error:
            raise UserError(f"{path}: its encoder does not fit this network: "
                            f"{' '.join(str(error).split())[:200]}") from None
        if not encoder:
            raise UserError(f"{path}: no tensor of it is named encoder.*; it is not a network of main.py "
                            f"(expected names with or without {PREFIX})")
