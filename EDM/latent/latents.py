"""Latents of a data set on disk, and the batches that training draws from them.

    <folder>/moments.npy    float32 or float16 [2N, 2C, s, s], mean and log-variance of each image and its mirror image
    <folder>/labels.npy     int64 [2N], the class of each row
    <folder>/latents.json   class names, the VAE's scale and fingerprint, resolution

A visit draws a latent anew from the moments of its row. Row i holds what the published code kept in the file i.npy of
its folder, a pickled pair of moments and class; such a folder is read too, and nothing in it is run.
"""
from __future__ import annotations

import json
import os
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from EDM.latent.vae import SCALE
from shared.cli import UserError
from shared.data.safe import load_array, load_objects
from shared.distributed import World
from shared.parallel import Prefetched
from shared.training.randomness import numpy_rng

MOMENTS, LABELS, ABOUT = "moments.npy", "labels.npy", "latents.json"
MAKE = "make it with extract_imagenet_features_semi.py"


@dataclass(frozen=True)
class ArrayRows:
    """Moments [N, 2C, s, s], memory-mapped, and classes int64 [N] by row number."""

    moments: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return moments [n, 2C, s, s] and classes int64 [n] of these rows."""
        return self.moments[rows], self.labels[rows]


@dataclass(frozen=True)
class PublishedRows:
    """The files 0.npy, 1.npy, ... of a published folder, each read when it is asked for."""

    folder: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = [self._read(row) for row in rows]
        return np.stack([moments for moments, _ in pairs]), np.array([label for _, label in pairs], np.int64)

    def _read(self, row: int) -> tuple[np.ndarray, int]:
        path = self.folder / f"{row}.npy"
        pair = load_objects(path)
        if len(pair) != 2 or not isinstance(pair[0], np.ndarray) or not isinstance(pair[1], int) or pair[0].ndim != 3:
            raise UserError(f"{path}: expected a pair of moments [2C, s, s] and a class")
        return pair[0], pair[1]


@dataclass(frozen=True)
class Latents:
    """classes: names in label order, () if unknown. coder: fingerprint of the VAE, "" if unknown."""

    folder: Path
    rows: ArrayRows | PublishedRows
    classes: tuple[str, ...] = ()
    scale: float = SCALE
    coder: str = ""

    def __len__(self) -> int:
        return len(self.rows)


def read_latents(folder: Path, z_shape: tuple[int, ...]) -> Latents:
    """Return the latents in a folder, ours or published; UserError if they are missing, damaged or of another shape."""
    if (folder / MOMENTS).exists():
        latents = _read_arrays(folder)
    elif (folder / "0.npy").exists():
        count = sum(entry.name.endswith(".npy") for entry in os.scandir(folder))
        latents = Latents(folder, PublishedRows(folder, count))
    else:
        raise UserError(f"{folder}: no latents there; {MAKE}")
    moments, _ = latents.rows.take(np.array([0, len(latents) - 1]))
    if moments.shape[1:] != (2 * z_shape[0], *z_shape[1:]):
        raise UserError(f"{folder}: its moments are {list(moments.shape[1:])}, --config.z_shape={tuple(z_shape)} has "
                        f"{[2 * z_shape[0], *z_shape[1:]]}")
    return latents


def _read_arrays(folder: Path) -> Latents:
    try:
        moments = np.load(folder / MOMENTS, mmap_mode="r")
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        classes, scale, coder = tuple(map(str, about["classes"])), float(about["scale"]), str(about["coder"])
    except (ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: cut short or damaged ({error}); {MAKE}") from None
    labels = load_array(folder / LABELS)
    if moments.ndim != 4 or labels.shape != moments.shape[:1] or moments.dtype.kind != "f" or not len(labels):
        raise UserError(f"{folder}: {MOMENTS} {list(moments.shape)} and {LABELS} {list(labels.shape)} do not belong "
                        f"together; {MAKE}")
    return Latents(folder, ArrayRows(moments, labels.astype(np.int64)), classes, scale, coder)


def drop_labels(labels: np.ndarray, draws: np.ndarray, p_uncond: float, none_label: int) -> np.ndarray:
    """Return the labels with none_label where the uniform draws are below p_uncond."""
    return np.where(draws < p_uncond, none_label, labels)


def draw_labels(labels: np.ndarray, draws: np.ndarray, posterior: np.ndarray) -> np.ndarray:
    """Return for each pseudo-label a class drawn by its row of posterior [K, K], p(class | pseudo-label), from uniform
    draws in [0, 1)."""
    classes = (draws[:, None] >= posterior.cumsum(1)[labels]).sum(1)
    return np.minimum(classes, len(posterior) - 1)  # rows add up to 1 but for rounding


class LatentBatches:
    """One process's part of each step's batch, read ahead in a thread.

    Every epoch visits all rows in a new order; an incomplete last batch is left out. p_uncond: share of labels that
    become none_label. posterior: p(class | pseudo-label) by which a class is drawn at each visit, float64 [K, K]; None:
    the pseudo-label. images: further arrays of rows, such as the photographs behind them. last: the last step. Raises
    UserError for a batch larger than the set.
    """

    def __init__(self, latents: Latents, batch: int, seed: int, p_uncond: float, none_label: int, world: World,
                 last: int, posterior: np.ndarray | None = None,
                 images: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        self.latents, self.batch, self.seed, self.posterior, self.images = latents, batch, seed, posterior, images
        self.p_uncond, self.none_label, self.device = p_uncond, none_label, world.device
        self.part = world.slice(batch)
        self.per_epoch = len(latents) // batch
        if not self.per_epoch:
            raise UserError(f"a batch of {batch} is larger than the {len(latents)} latents; give a smaller "
                            "--config.train.batch_size")
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, np.int64)
        self._read_ahead = Prefetched(self._read, last)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return moments float32 [n, 2C, s, s], labels int64 [n] and, if there are any, the images of the rows, on the
        device; nothing waits for it."""
        moments, labels, images = (None if part is None else part.to(self.device, non_blocking=True)
                                   for part in self._read_ahead(step))
        return moments.float(), labels, images

    def _read(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = self._rows(step)
        moments, labels = self.latents.rows.take(rows)
        if self.none_label >= 0 and (labels.min() < 0 or labels.max() >= self.none_label):
            raise UserError(f"the latents have classes up to {labels.max()}, --config.nnet.num_classes="
                            f"{self.none_label + 1} is made for 0 to {self.none_label - 1} and none")
        if self.posterior is not None:
            labels = draw_labels(labels, self._uniform(step, "class of a pseudo-label"), self.posterior)
        labels = drop_labels(labels, self._uniform(step, "label dropout"), self.p_uncond, self.none_label)
        images = None if self.images is None else self._pinned(self.images(rows))
        return self._pinned(moments), self._pinned(labels), images

    def _uniform(self, step: int, purpose: str) -> np.ndarray:
        return numpy_rng(self.seed, step, purpose).random(self.batch)[self.part]

    def _rows(self, step: int) -> np.ndarray:
        epoch, position = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, numpy_rng(self.seed, epoch, "order").permutation(len(self.latents))
        return self._order[1][position * self.batch:][:self.batch][self.part]

    def _pinned(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor  # a GPU fetches from there by itself
