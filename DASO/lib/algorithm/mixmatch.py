"""MixMatch: labels guessed from two views and sharpened; labelled and unlabelled images mixed with each other.

Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019 (arXiv 1905.02249). With
ALGORITHM.MIXMATCH.APPLY_DASO the guesses are blended with the semantic ones of DASO.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.algorithm.daso import Semantics
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from shared.augment.mixing import Mixed, forward_mixed
from shared.distributed import gather


class MixMatch(Algorithm):
    views = ("weak", "weak")
    state = ("semantics",)

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.semantics = Semantics(cfg, setting) if cfg.ALGORITHM.MIXMATCH.APPLY_DASO else None

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        target, kinds = self.guess(batch, it)
        mixed = mix(self, batch, target, self.cfg.ALGORITHM.MIXMATCH.MIXUP_ALPHA, draws)
        labelled, unlabelled = mixed_losses(self, mixed)
        ramp = self.ramp_up(it)
        losses = {"loss_cls": labelled, "loss_cons": ramp * self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * unlabelled}
        return Step(losses, labelled_logits(self, mixed), kinds, log={"cons_rampup_coeff": ramp})

    @torch.no_grad()
    def guess(self, batch: Batch, it: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the guessed probabilities [B_u, K] of the unlabelled images, and their pseudo-labels."""
        if self.semantics is not None:
            self.semantics.push(self.teacher.encoder(batch.labelled), batch.labels)
        features = [self.model.encoder(view) for view in batch.views]
        first, second = (self.model.classifier(part).softmax(1) for part in features)
        guessed = sharpen((first + second) / 2, self.cfg.ALGORITHM.MIXMATCH.TEMPERATURE)
        if self.semantics is None:
            return guessed, {}
        target, semantic = self.semantics.blend(guessed, features[0], it)
        return target, self.semantics.count(guessed, semantic, target, it)


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Return probabilities [n, K] to the power 1 / temperature, normalised again."""
    weights = probabilities ** (1 / temperature)
    return weights / weights.sum(1, keepdim=True)


def mix(learner: Algorithm, batch: Batch, target: Tensor, alpha: float, draws: Draws) -> Mixed:
    """Mix the labelled images and all views, labelled `target` [B_u, K], and classify them chunk by chunk.

    A chunk is as large as the labelled batch, which therefore must be as large as the unlabelled one.
    """
    world = learner.setting.world
    one_hot = F.one_hot(batch.labels, learner.setting.num_classes).to(target.dtype)
    fraction = draws.beta(alpha)
    permutation = draws.permutation(sum(batch.sizes) * world.size)
    return forward_mixed(lambda images, chunk: learner.model(images), world, [batch.labelled, *batch.views],
                         [one_hot, *[target] * len(batch.views)], fraction, permutation)


def mixed_losses(learner: Algorithm, mixed: Mixed) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of images mixed from labelled ones, and MODEL.LOSS.UNLABELED_LOSS of the others."""
    labelled, unlabelled = mixed.means(F.cross_entropy(mixed.logits, mixed.targets, reduction="none"))
    if learner.cfg.MODEL.LOSS.UNLABELED_LOSS == "MSELoss":
        unlabelled = mixed.means(((mixed.logits.softmax(1) - mixed.targets) ** 2).mean(1))[1]
    return labelled, unlabelled


def labelled_logits(learner: Algorithm, mixed: Mixed) -> Tensor:
    """Return the logits [B_l, K] of the images mixed from this rank's labelled ones, without gradient."""
    world = learner.setting.world
    logits, rows = gather(mixed.logits, world), gather(mixed.rows, world)
    in_order = torch.empty_like(logits).index_copy_(0, rows, logits)
    count = mixed.size * world.size
    return in_order[:count][world.slice(count)]
