"""CReST: generations of training, each on the labelled images and those that the last one pseudo-labelled.

Wei et al., "CReST: A Class-Rebalancing Self-Training Framework for Imbalanced Semi-Supervised Learning", CVPR 2021
(arXiv 2102.09559), sections 3.2 and 3.3.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from DASO.lib.algorithm.interface import Setting, Training
from DASO.lib.config.config import Config
from shared.cli import UserError


class SelfTraining:
    """The generations of a run. The images that they add are kept by the trainer's batches."""

    def __init__(self, cfg: Config, setting: Setting) -> None:
        self.cfg, self.setting, self.options = cfg, setting, cfg.ALGORITHM.CREST
        self.period, total = self.options.GEN_PERIOD_STEPS, cfg.SOLVER.MAX_ITER
        if total % self.period:
            raise UserError(f"SOLVER.MAX_ITER {total} must be a multiple of ALGORITHM.CREST.GEN_PERIOD_STEPS "
                            f"{self.period}, the length of a generation")
        self.generations = total // self.period

    def generation(self, it: int) -> int:
        """Return the generation of an iteration, from 1."""
        return it // self.period + 1

    def exponent(self, it: int) -> float:
        """Return the exponent of the target of the distribution alignment."""
        if not self.options.PROGRESSIVE_ALIGN:
            return self.cfg.MODEL.DIST_ALIGN.TEMPERATURE
        return alignment_exponent(self.generation(it), self.generations, self.options.TMIN)

    def log(self, it: int) -> dict[str, float]:
        return {"crest/DA_temperature": self.exponent(it), "crest/current_gen": float(self.generation(it))}

    def after_iteration(self, training: Training, it: int) -> None:
        """At the end of a generation, except the last: extend the labelled set and start anew."""
        if (it + 1) % self.period or it + 1 == self.cfg.SOLVER.MAX_ITER:
            return
        probabilities = training.predict(training.batches.unlabelled).softmax(1)
        index, labels = select(probabilities, sampling_rates(self.setting.labelled_counts, self.options.ALPHA))
        training.batches.extend(index.cpu().numpy(), labels.cpu().numpy())
        training.restart(self.generation(it + 1))
        added = torch.bincount(labels, minlength=self.setting.num_classes).tolist()
        training.run.log.print(f"generation {self.generation(it + 1)} of {self.generations}: {len(index)} "
                               f"pseudo-labelled images join the labelled ones, a class {added}")


def sampling_rates(counts: Sequence[int], alpha: float) -> Tensor:
    """Return mu [K], float32: (counts[c] / largest count) ** (1 / alpha), of the initial labelled images."""
    counts = torch.tensor(counts, dtype=torch.float32)
    return (counts / counts.max()) ** (1 / alpha)


def select(probabilities: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions and pseudo-labels of the unlabelled images to add, both int64 [added].

    probabilities: of all unlabelled images [N, K]. Of the m images predicted as class c the int(rates[K - 1 - c] * m)
    most confident are kept: the rarer a class, the more of its images (classes are taken to be sorted by falling
    frequency, as published). Class by class, within a class by falling confidence.
    """
    confidence, label = probabilities.max(1)
    by_confidence = confidence.argsort(descending=True, stable=True)
    order = by_confidence[label[by_confidence].argsort(stable=True)]
    members = torch.bincount(label, minlength=probabilities.shape[1])
    kept = (rates.flip(0).to(members.device) * members.float()).int()
    first = members.cumsum(0) - members
    rank = torch.arange(len(order), device=order.device) - first[label[order]]
    order = order[rank < kept[label[order]]]
    return order, label[order]


def alignment_exponent(generation: int, generations: int, smallest: float) -> float:
    """Return the exponent of the target distribution: linearly from 1 in the first generation to `smallest`.

    With a single generation it is 1.
    """
    fraction = (generation - 1) / (generations - 1) if generations > 1 else 0.0
    return 1.0 - fraction + fraction * smallest
