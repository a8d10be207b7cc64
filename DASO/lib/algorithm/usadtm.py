"""USADTM: images are compared with the mean features of labelled ones, and clusters are kept apart without labels.

Han et al., "Unsupervised Semantic Aggregation and Deformable Template Matching for Semi-Supervised Learning", NeurIPS
2020 (arXiv 2010.05517).
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.algorithm.daso import FeatureQueue
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import cross_entropy
from shared.distributed import World, gather, sum_with_gradient

SMALLEST = torch.finfo(torch.float64).eps
QUEUE_PER_LABELLED = 5  # features kept of a class, for each of its labelled images


class USADTM(Algorithm):
    """State: `queue`, recent features of the labelled images, the teacher's with USADTM.WITH_EMA_PROTOTYPE."""

    views = ("eval", "weak", "strong")
    state = ("queue",)

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        sizes = [QUEUE_PER_LABELLED * max(count, 1) for count in setting.labelled_counts]
        self.queue = FeatureQueue(setting.num_classes, sizes, setting.feature_size, setting.device)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        options, world = self.cfg.ALGORITHM.USADTM, self.setting.world
        features = self.model.encoder(batch.images)
        labelled, plain, weak, strong = self.model.classifier(features).split(batch.sizes)
        labelled_features, _, weak_features, _ = features.detach().split(batch.sizes)
        if options.WITH_EMA_PROTOTYPE:
            with torch.no_grad():
                labelled_features = self.teacher.encoder(batch.labelled)
        self.queue.push(gather(labelled_features.float(), world), gather(batch.labels, world))
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "uc_loss": options.UC_LOSS_WEIGHT * triplet_mutual_information(plain, weak, strong, world)}
        if it < options.PRETRAIN_STEPS:
            return Step({**losses, "loss_cons": strong.sum() * 0.0})
        label, mask = match(weak_features, self.queue.prototypes, options.DTM_THRES)
        losses["loss_cons"] = self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * cross_entropy(strong, label, mask)
        return Step(losses, None, {"main": label}, mask)


def match(features: Tensor, prototypes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the class int64 [n] whose prototype has the most similar direction, and 1 for trusted ones [n].

    Trusted: the similarity (cosine) reaches `threshold` and that prototype is also the nearest one.
    """
    features = features.to(prototypes.dtype)
    similarity, label = F.cosine_similarity(features[:, None], prototypes[None], dim=2).max(1)
    nearest = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return label, ((label == nearest) & (similarity >= threshold)).to(features.dtype)


def triplet_mutual_information(x: Tensor, y: Tensor, z: Tensor, world: World) -> Tensor:
    """Return minus the mutual information of the classes of three views, the mean over their pairs; logits [n, K]."""
    return (mutual_information(x, y, world) + mutual_information(x, z, world) + mutual_information(y, z, world)) / 3


def mutual_information(x: Tensor, y: Tensor, world: World) -> Tensor:
    """Return minus the mutual information between the classes of two views of all ranks' images; logits [n, K].

    Ji et al., "Invariant Information Clustering", ICCV 2019 (arXiv 1807.06653), equations 2 and 3.
    """
    # Not as a product of matrices, which would be one of bfloat16 where that is the network's precision.
    joint = sum_with_gradient((x.softmax(1)[:, :, None] * y.softmax(1)[:, None, :]).sum(0), world)
    joint = (joint + joint.T) / 2
    joint = joint / joint.sum()
    rows, columns = (joint.sum(dim, keepdim=True).clamp(min=SMALLEST) for dim in (1, 0))
    joint = joint.clamp(min=SMALLEST)
    return -(joint * (joint.log() - rows.log() - columns.log())).sum()
