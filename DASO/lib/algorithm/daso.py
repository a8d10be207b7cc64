"""DASO: pseudo-labels of a linear and of a similarity classifier, blended class by class, and aligned semantics.

Oh, Kim and Kweon, "DASO: Distribution-Aware Semantics-Oriented Pseudo-label for Imbalanced Semi-Supervised Learning",
CVPR 2022 (arXiv 2106.05682), section 3, on FixMatch; with ALGORITHM.ABC.APPLY also for a balanced second classifier.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from DASO.lib.algorithm.fixmatch import BalancedHead
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.config.config import Config
from DASO.lib.losses import adjusted, cross_entropy
from shared.distributed import all_sum, gather
from shared.training.checkpoint import Stateful

EPSILON = 1e-8  # of a cosine: a prototype of zeros resembles nothing


class DASO(Algorithm):
    logged_pseudo_labels = ("main", "linear", "semantic")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.semantics = Semantics(cfg, setting)
        self.balanced = BalancedHead(cfg, setting) if cfg.ALGORITHM.ABC.APPLY else None

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        # The teacher is in train mode: the labelled images alone move its batch statistics here, as published.
        with torch.no_grad():
            self.semantics.push(self.teacher.encoder(batch.labelled), batch.labels)
        features = self.model.encoder(batch.images)
        _, weak_features, strong_features = features.split(batch.sizes)
        labelled, weak, strong = self.model.classifier(features).split(batch.sizes)

        linear, losses = weak.detach().softmax(1), {}
        target, semantic = self.semantics.blend(linear, weak_features.detach(), it)
        if semantic is not None and self.cfg.ALGORITHM.DASO.PSA_LOSS_WEIGHT > 0:
            losses["loss_assign"] = self.semantics.alignment_loss(strong_features, semantic)
        if self.balanced is not None:
            heads = self.model.abc_classifier(features).split(batch.sizes)
            blended = semantic is not None and self.cfg.ALGORITHM.ABC.DASO_PSEUDO_LABEL
            blend = (lambda probabilities: self.semantics.blender(probabilities, semantic)) if blended else None
            losses["loss_abc"] = self.balanced.loss(*heads, batch.labels, it, draws, blend)

        label, mask = self.confident(target)
        labelled = adjusted(labelled, self.cfg, self.setting.prior)
        losses["loss_cls"] = self.labelled_loss(labelled, batch.labels, it)
        losses["loss_cons"] = self.cfg.MODEL.LOSS.UNLABELED_LOSS_WEIGHT * cross_entropy(strong, label, mask)
        return Step(losses, None, self.semantics.count(linear, semantic, target, it), mask)

    def state_dict(self) -> dict[str, Any]:
        return self.semantics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.semantics.load_state_dict(state)


class Semantics(Stateful):
    """Semantic pseudo-labels, for any learner.

    queue: recent features of the labelled images. blender: knows the distribution of recent pseudo-labels. by_class:
    blend by class; None: ALGORITHM.DASO.WITH_DIST_AWARE.
    """

    state = ("queue", "blender")

    def __init__(self, cfg: Config, setting: Setting, by_class: bool | None = None) -> None:
        self.options, self.world = cfg.ALGORITHM.DASO, setting.world
        self.queue = FeatureQueue(setting.num_classes, cfg.MODEL.QUEUE.MAX_SIZE, setting.feature_size, setting.device)
        self.blender = Blender(cfg, setting, self.options.WITH_DIST_AWARE if by_class is None else by_class)

    def push(self, features: Tensor, labels: Tensor) -> None:
        """Store features [n, D] of this rank's labelled images (section 3.2)."""
        self.queue.push(gather(features.float(), self.world), gather(labels, self.world))

    @torch.no_grad()
    def blend(self, linear: Tensor, features: Tensor, it: int) -> tuple[Tensor, Tensor | None]:
        """Return linear pseudo-labels [n, K] blended with the semantic ones of features [n, D]; and the latter.

        Before ALGORITHM.DASO.PRETRAIN_STEPS the linear ones stay as they are, and there are no others.
        """
        if it < self.options.PRETRAIN_STEPS:
            return linear, None
        semantic = (self.queue.similarity(features) / self.options.PROTO_TEMP).softmax(1)  # equation 2
        return self.blender(linear, semantic), semantic

    def alignment_loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the weighted cross-entropy [] of the similarity classifier on features [n, D] (equation 7)."""
        logits = self.queue.similarity(features) / self.options.PROTO_TEMP
        return self.options.PSA_LOSS_WEIGHT * cross_entropy(logits, target)

    def count(self, linear: Tensor, semantic: Tensor | None, target: Tensor, it: int) -> dict[str, Tensor]:
        """Count the blended pseudo-labels; return the labels int64 [n] of all three kinds."""
        label, linear = target.argmax(1), linear.argmax(1)
        self.blender.count(label, it)
        semantic = torch.full_like(label, -1) if semantic is None else semantic.argmax(1)
        return {"main": label, "linear": linear, "semantic": semantic}


class Blender(Stateful):
    """The fraction of the semantic pseudo-label in the pseudo-labels of each class.

    histogram: float32 [K], the distribution of the pseudo-labels between the last two updates (zeros before the first
    one). counts: float32 [K], since the last one.
    """

    state = ("histogram", "counts")

    def __init__(self, cfg: Config, setting: Setting, by_class: bool = True) -> None:
        self.options, self.world, self.by_class = cfg.ALGORITHM.DASO, setting.world, by_class
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.histogram = torch.zeros(setting.num_classes, device=setting.device)
        self.counts = torch.zeros_like(self.histogram)

    def fractions(self) -> Tensor:
        """Return upsilon [K] in 0..1: 1 for the class most often predicted (equation 5); 0 without a histogram."""
        powered = self.histogram ** (1 / self.options.DIST_TEMP)
        return powered / powered.max().clamp(min=torch.finfo(powered.dtype).tiny)

    def __call__(self, linear: Tensor, semantic: Tensor) -> Tensor:
        """Return pseudo-labels [n, K]: (1 - a) linear + a semantic, a by the linear label's class (equation 4)."""
        fraction = self.fractions()[linear.argmax(1)][:, None] if self.by_class else self.options.INTERP_ALPHA
        return (1 - fraction) * linear + fraction * semantic

    @torch.no_grad()
    def count(self, labels: Tensor, it: int) -> None:
        """Count this rank's pseudo-labels int64 [n] of iteration `it`; update the histogram when it is time."""
        new = torch.zeros_like(self.counts).scatter_add_(0, labels, torch.ones_like(labels, dtype=torch.float32))
        self.counts = self.counts + all_sum(new, self.world)
        if (it + 1) % self.options.PL_DIST_UPDATE_PERIOD == 0 and it + 1 < self.max_iter:
            self.histogram = self.counts / self.counts.sum()
            self.counts = torch.zeros_like(self.counts)


class FeatureQueue(Stateful):
    """The last features of every class, first in, first out, and their means: the prototypes.

    capacity: features of a class, one number or K of them. Attributes: `features` float32 [K, largest capacity, D];
    `pushed` int64 [K], how many ever came; `prototypes` float32 [K, D], zeros for a class that was not seen yet.
    """

    state = ("features", "pushed", "prototypes")

    def __init__(self, num_classes: int, capacity: int | Sequence[int], feature_size: int,
                 device: torch.device | str = "cpu") -> None:
        each = [capacity] * num_classes if isinstance(capacity, int) else list(capacity)
        self.capacity = torch.tensor(each, device=device).clamp(min=1)
        self.largest = max(1, *each)
        self.features = torch.zeros(num_classes, self.largest, feature_size, device=device)
        self.pushed = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.prototypes = torch.zeros(num_classes, feature_size, device=device)
        # One row after the rings takes the dropped features: shapes do not depend on the data.
        self._discard = num_classes * self.largest

    @property
    def sizes(self) -> Tensor:
        """How many features of each class are stored, int64 [K]."""
        return torch.minimum(self.pushed, self.capacity)

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> None:
        """Store features [n, D] of classes int64 [n], in order, of the global batch."""
        classes = F.one_hot(labels, len(self.pushed))
        counts = classes.sum(0)
        rank = classes.cumsum(0).gather(1, labels[:, None])[:, 0] - 1  # among this batch's images of its class
        kept = rank >= (counts - self.capacity)[labels]  # of more than fit, the last ones
        slot = (self.pushed[labels] + rank) % self.capacity[labels]
        place = torch.where(kept, labels * self.largest + slot, self._discard)
        flat = self.features.view(-1, self.features.shape[2])
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
        flat[place] = features.to(flat.dtype)
        self.features = flat[:-1].view_as(self.features)
        self.pushed = self.pushed + counts
        mean = self.features.sum(1) / self.sizes.clamp(min=1)[:, None]
        self.prototypes = torch.where((counts > 0)[:, None], mean, self.prototypes)

    def similarity(self, features: Tensor) -> Tensor:
        """Return the cosine of features [n, D] with every prototype: float [n, K] in -1..1."""
        unit = features.float() / features.float().norm(dim=1, keepdim=True).clamp(min=EPSILON)
        prototypes = self.prototypes / self.prototypes.norm(dim=1, keepdim=True).clamp(min=EPSILON)
        # Temperatures of 0.05 need more digits than the network's bfloat16 has.
        with torch.autocast(unit.device.type, enabled=False):
            return unit @ prototypes.T
