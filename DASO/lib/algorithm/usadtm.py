"""USADTM: images are compared with the mean features of labelled ones, and clusters are kept apart without labels.

Han et al., "Unsupervised Semantic Aggregation and Deformable Template Matching for Semi-Supervised Learning", NeurIPS
2020 (arXiv 2010.05517).
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.algorithm.feature_queue import FeatureQueue
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import consistency

SMALLEST = torch.finfo(torch.float64).eps
QUEUE_PER_LABELLED = 5  # features kept of a class, for each of its labelled images


class USADTM(Algorithm):
    """`queue`: recent features of the labelled images. The teacher's with ALGORITHM.USADTM.WITH_EMA_PROTOTYPE."""

    state = ("queue",)

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        sizes = [QUEUE_PER_LABELLED * max(count, 1) for count in setting.labelled_counts]
        self.queue = FeatureQueue(setting.num_classes, sizes, setting.feature_size, setting.device)

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return ("eval", "weak", "strong")

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        options = self.cfg.ALGORITHM.USADTM
        features = self.model.encoder(torch.cat([batch.labelled, *batch.views]))
        sizes = [len(batch.labelled), *map(len, batch.views)]
        labelled, plain, weak, strong = self.model.classifier(features).split(sizes)
        labelled_features, _, weak_features, _ = features.detach().split(sizes)
        if options.WITH_EMA_PROTOTYPE:
            with torch.no_grad():
                labelled_features = self.teacher.encoder(batch.labelled)
        gather = self.setting.gather
        self.queue.push(gather(labelled_features.float()), gather(batch.labels))
        losses = {"loss_cls": self.labelled_loss(labelled, batch.labels, it),
                  "uc_loss": options.UC_LOSS_WEIGHT * triplet_mutual_information(plain, weak, strong, self.setting)}
        if it < options.PRETRAIN_STEPS:
            return Step({**losses, "loss_cons": strong.sum() * 0.0})
        label, mask = match(weak_features, self.queue.prototypes, options.DTM_THRES)
        losses["loss_cons"] = self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * consistency(strong, label, mask)
        return Step(losses, None, {"main": label}, mask)


def match(features: Tensor, prototypes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the class int64 [n] whose prototype has the most similar direction, and 1 where it is to be trusted [n].

    It is where the similarity (cosine) reaches `threshold` and that prototype is also the nearest one.
    """
    features = features.to(prototypes.dtype)
    similarity, label = F.cosine_similarity(features[:, None], prototypes[None], dim=2).max(1)
    nearest = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return label, ((label == nearest) & (similarity >= threshold)).to(features.dtype)


def triplet_mutual_information(x: Tensor, y: Tensor, z: Tensor, setting: Setting) -> Tensor:
    """Return minus the mutual information of the classes of three views, the mean over their pairs; logits [n, K]."""
    return (mutual_information(x, y, setting) + mutual_information(x, z, setting)
            + mutual_information(y, z, setting)) / 3


def mutual_information(x: Tensor, y: Tensor, setting: Setting) -> Tensor:
    """Return minus the mutual information between the classes of two views of all ranks' images; logits [n, K].

    Ji et al., "Invariant Information Clustering", ICCV 2019 (arXiv 1807.06653), equations 2 and 3.
    """
    # Not as a product of matrices, which would be one of bfloat16 where that is the network's precision.
    joint = setting.sum_with_gradient((x.softmax(1)[:, :, None] * y.softmax(1)[:, None, :]).sum(0))
    joint = (joint + joint.T) / 2
    joint = joint / joint.sum()
    rows, columns = (joint.sum(dim, keepdim=True).clamp(min=SMALLEST) for dim in (1, 0))
    joint = joint.clamp(min=SMALLEST)
    return -(joint * (joint.log() - rows.log() - columns.log())).sum()
