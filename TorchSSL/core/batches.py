"""The batch of a step: which images, which views of them. A function of (seed, step) alone, on any number of ranks."""
from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from shared.augment.randaugment import to_device
from shared.augment.views import WeakPolicy, draw_strong, draw_weak, randaugment, rotate_quarter_turns, strong, weak
from shared.cli import UserError
from shared.data.pool import Pool
from shared.distributed import World
from shared.training.randomness import numpy_rng
from TorchSSL.core.data import TrainingData
from TorchSSL.core.photographs import CROP, PhotographPool, PhotographSet, make_pool


@dataclass
class Batch:
    """One rank's part of a step's batch, on its device.

    labeled: float32 [B, C, H, W], weak views, normalised. labels: int64 [B]. views: float32 [uratio * B, C, H, W] each,
    of the same unlabelled images, in the order the algorithm names them. index: int64 [uratio * B], their positions in
    the unlabelled set. truth: int64, their true labels or -1: for metrics only, no loss may look at it. turns: int64,
    quarter turns of the "rotated" view. labeled_views: more views of the labelled images, float32 [B, C, H, W] each.
    """

    labeled: torch.Tensor
    labels: torch.Tensor
    views: tuple[torch.Tensor, ...] = ()
    index: torch.Tensor | None = None
    truth: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    labeled_views: tuple[torch.Tensor, ...] = ()


class Batches:
    """Makes the batch of any step.

    views: "weak" (flip and shift), "medium" (one operation of RandAugment), "strong" (RandAugment and cutout; both then
    have a flip and shift of their own) or "rotated" (the first strong view, turned; behind all others) for each view of
    an unlabelled image; labeled_views: weak or strong ones of a labelled image, besides its first weak one. size:
    labelled images in the global batch; every rank has an equal part of it. Raises UserError where the images are too
    small for the weak augmentation or cannot be rotated.
    """

    def __init__(self, data: TrainingData, options: argparse.Namespace, world: World, views: tuple[str, ...],
                 size: int, labeled_views: tuple[str, ...] = ()) -> None:
        self.data, self.options, self.world = data, options, world
        self.rotated = "rotated" in views
        self.views, self.labeled_views = tuple(view for view in views if view != "rotated"), labeled_views
        self.first_strong = self.views.index("strong") if self.rotated else None
        height, width = data.unlabeled.size
        if self.rotated and height != width:
            raise UserError(f"images of {height}x{width} cannot be rotated by quarter turns; this algorithm needs "
                            "square images")
        self.labeled, self.unlabeled = (
            make_pool(images, data.mean, data.std, world.device, options.num_workers, options.decoder)
            for images in (data.labeled, data.unlabeled))
        self.policy = WeakPolicy(options.weak_flip, options.weak_pad, options.weak_pad_mode, options.weak_subpixel,
                                 CROP if isinstance(data.unlabeled, PhotographSet) else None)
        draw_weak(1, np.random.default_rng(0), data.unlabeled.size, self.policy)  # refuses what does not fit, now
        self.memory_format = torch.contiguous_format if options.strict else torch.channels_last
        # Drawn for the global batch, labelled images first, then view after view; this rank's part of each.
        self.counts = [size] + [size * options.uratio] * len(self.views) + [size] * len(labeled_views)
        self.parts = [world.slice(count) for count in self.counts]
        starts = np.cumsum([0, *self.counts])
        self.rows = np.concatenate([start + np.arange(part.start, part.stop)
                                    for start, part in zip(starts, self.parts, strict=False)])

    def __call__(self, step: int) -> Batch:
        """Return the batch of `step`."""
        size, device = self.data.unlabeled.size, self.world.device
        labeled = self.labeled_positions(step)[self.parts[0]]
        images = [self.labeled.take(labeled)]
        index = None
        if self.views:
            count, part = self.counts[1], self.parts[1]
            unlabeled = self.rng(step, "unlabeled").integers(len(self.unlabeled), size=count)[part]
            plain, index = self.unlabeled.take(unlabeled), to_device(unlabeled, device)
        for number, view in enumerate(self.views):
            images.append(self.augmented(self.unlabeled, unlabeled, plain, view, step, f"{view} {number}", count, part))
        for number, view in enumerate(self.labeled_views):
            purpose = f"labeled {view} {number}"
            images.append(self.augmented(self.labeled, labeled, images[0], view, step, purpose, self.counts[0],
                                         self.parts[0]))
        draws = draw_weak(sum(self.counts), self.rng(step, "weak"), size, self.policy)[self.rows]
        joint = weak(torch.cat(images), draws, self.data.mean, self.data.std)
        joint = joint.contiguous(memory_format=self.memory_format)
        first, *views = joint.split([len(part) for part in images])
        views, labeled_views = views[:len(self.views)], views[len(self.views):]
        turns = None
        if self.rotated:
            turns = self.rng(step, "turns").integers(4, size=count)[part]
            views.append(rotate_quarter_turns(views[self.first_strong], turns))
            turns = to_device(turns, device)
        return Batch(first, self.labeled.labels[to_device(labeled, device)], tuple(views), index,
                     None if index is None else self.unlabeled.labels[index], turns, tuple(labeled_views))

    def augmented(self, pool: Pool | PhotographPool, positions: np.ndarray, images: torch.Tensor, view: str, step: int,
                  purpose: str, count: int, part: slice) -> torch.Tensor:
        """Return this rank's uint8 images [n, C, H, W] as a view begins, before its flip and shift.

        images: those at `positions` of the pool. count: images in the global batch, of which these are `part`.
        """
        if view == "weak":
            return images
        operations = 1 if view == "medium" else self.options.strong_ops
        draws = draw_strong(count, self.rng(step, purpose), self.data.unlabeled.size, operations)[part]
        if isinstance(pool, PhotographPool):  # before they are made squares
            return (pool.medium if view == "medium" else pool.strong)(positions, draws)
        if view == "medium":
            return randaugment.apply(images, draws.operations, draws.magnitudes)
        return strong(images, draws)

    def labeled_positions(self, step: int) -> np.ndarray:
        """Draw the global labelled batch, with replacement: uniformly, or with a share of real images.

        A share that is no whole number of images is met on average.
        """
        rng, count = self.rng(step, "labeled"), self.counts[0]
        real, share = self.data.num_real, self.options.real_fraction
        if share is None:
            return rng.integers(len(self.labeled), size=count)
        from_real = int(count * share + rng.random())
        return np.concatenate([rng.integers(real, size=from_real),
                               rng.integers(real, len(self.labeled), size=count - from_real)])

    def rng(self, step: int, purpose: str) -> np.random.Generator:
        return numpy_rng(self.options.seed, step, purpose)
