"""Latent codes of a data set in memory-mapped files: written image by image, read copy by copy.

    latent_codes/<dataset>/train_code_<copy>.npy   float32 [N, 4, 32, 32], one augmented copy of the training set each
    latent_codes/<dataset>/test_code_0.npy         float32 [N, 4, 32, 32]
    latent_codes/<dataset>/{train,test}_label.npy  int64 [N]
"""
from __future__ import annotations

import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from DDAE.ddae.config import MACHINE
from shared.cli import Int, Option, Text, UserError
from shared.data.safe import load_array

DIT = (
    *MACHINE,
    Option("--dataset", Text, "cifar", "cifar, tiny, or images by name or path"),
    Option("--codes", Text, "latent_codes", "folder of the latents", metavar="DIR"),
    Option("--seed", Int(), 0, "seed of all random numbers"),
)


def code_folder(options: SimpleNamespace) -> Path:
    """Return the folder of the data set's latents."""
    return Path(options.codes) / Path(options.dataset).name


def code_path(folder: Path, split: str, copy: int) -> Path:
    return folder / f"{split}_code_{copy}.npy"


@dataclass(frozen=True)
class Latents:
    """The codes of a split: float32 [N, C, S, S] for each copy, memory-mapped, and int64 labels [N]."""

    copies: tuple[np.ndarray, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, copy: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return row i from copy[i]: float32 [n, C, S, S]."""
        return np.stack([self.copies[c][item] for c, item in zip(copy, items, strict=True)])


def read_latents(folder: Path, split: str, most: int | None = None) -> Latents:
    """Return the copies of a split, at most `most`. Raises UserError for missing, unequal or damaged files."""
    found = sorted((int(match[1]), path) for path in folder.glob(f"{split}_code_*.npy")
                   if (match := re.fullmatch(rf"{split}_code_(\d+)\.npy", path.name)))
    labels = folder / f"{split}_label.npy"
    if not found or not labels.exists():
        raise UserError(f"{folder}: no {split}_code_0.npy and {split}_label.npy there; make them with "
                        "vae_preprocessing.py")
    try:
        copies = tuple(np.load(path, mmap_mode="r") for _, path in found)
    except (ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{folder}: cut short or not plain arrays ({error}); make them anew with vae_preprocessing.py"
                        ) from None
    numbers = load_array(labels)
    shapes = {array.shape for array in copies}
    if len(shapes) != 1 or len(copies[0].shape) != 4 or copies[0].shape[:1] != numbers.shape:
        raise UserError(f"{folder}: the {split} files do not belong together: codes {sorted(shapes)}, labels "
                        f"{numbers.shape}")
    return Latents(copies[:most], numbers.astype(np.int64))
