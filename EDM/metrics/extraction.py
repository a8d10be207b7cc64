"""One pass over images: through a detector, into moments, and into memory only where a metric needs every feature."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from EDM.metrics.detectors import Detector
from EDM.metrics.frechet import Moments
from EDM.metrics.sources import Source
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World, gather
from shared.training.progress import Progress
from shared.training.seeds import split_batches


@dataclass(frozen=True)
class Extraction:
    """What a pass leaves. The moments are those of all ranks; what is kept lies on the CPU of rank 0 alone.

    features: float32 [N, F], logits: float32 [N, classes], labels: int64 [N], in the order of the images, or None.
    """

    moments: Moments
    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None


def extract(source: Source, detector: Detector, batch: int, world: World, *, keep_features: bool = False,
            keep_logits: bool = False) -> Extraction:
    """Show every image of `source` to the detector once, the ranks sharing the work.

    Held in memory: the moments (8 (F + 1)^2 bytes), a batch and the few that are being decoded; with keep_features
    4 N F bytes more, with keep_logits 4 N classes. Raises UserError for features that are not finite.
    """
    device = detector.device
    if device.type == "cpu":
        keep_freed_memory()
    # Apple GPUs have no float64.
    moments = Moments(detector.num_features, "cpu" if device.type == "mps" else device)
    kept = _Kept(len(source), detector, keep_features, keep_logits, world)
    parts = split_batches(range(len(source)), batch, world.size)
    counter = Progress(f"features of {detector.name}", len(source), "images", shown=world.main)
    for turn, (images, labels) in enumerate(source.batches(parts[world.rank::world.size])):
        # One memory layout, whatever the source: another one is another kernel, which rounds differently.
        features, logits = _detect(detector, images.to(device).contiguous())
        if not features.isfinite().all():
            raise UserError(f"{detector.name} gave features that are not finite numbers: check --detector")
        moments.add(features)
        together = parts[turn * world.size:(turn + 1) * world.size]
        kept.put(together[0][0], [len(part) for part in together], features, logits, labels.to(device))
        counter.advance(sum(map(len, together)))
    counter.close()
    return Extraction(moments.over_ranks(world), kept.features, kept.logits, kept.labels)


def _detect(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor | None]:
    if len(images):
        return detector(images)
    logits = torch.zeros(0, detector.num_logits, device=images.device) if detector.num_logits else None
    return torch.zeros(0, detector.num_features, device=images.device), logits


class _Kept:
    """The rows that rank 0 keeps; the other ranks hand them over batch by batch and hold none."""

    def __init__(self, count: int, detector: Detector, keep_features: bool, keep_logits: bool, world: World) -> None:
        self.wanted, self.world = {"features": keep_features, "logits": keep_logits, "labels": keep_features}, world
        self.features = self.logits = self.labels = None
        if keep_features and world.main:
            self.features = torch.empty(count, detector.num_features)
            self.labels = torch.empty(count, dtype=torch.int64)
        if keep_logits and world.main:
            self.logits = torch.empty(count, detector.num_logits)

    def put(self, start: int, sizes: list[int], features: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        """Store the rows of all ranks, `sizes` of them, from position `start` on."""
        for rows, name, store in ((features, "features", self.features), (logits, "logits", self.logits),
                                  (labels, "labels", self.labels)):
            if self.wanted[name]:
                together = _in_order(rows, sizes, self.world)
                if store is not None:
                    store[start:start + len(together)] = together.cpu()


def _in_order(rows: Tensor, sizes: list[int], world: World) -> Tensor:
    """Return the rows of all ranks, of which rank r has sizes[r], one rank after another."""
    if world.size == 1:
        return rows
    longest = max(sizes)
    padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, longest - len(rows)))
    return torch.cat([part[:size] for part, size in zip(gather(padded, world).split(longest), sizes, strict=True)])
