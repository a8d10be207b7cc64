"""The folder of generated images: its published name, what is there already, and the sheets."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from DDAE.ddae.pictures import write_sheet
from shared.cli import UserError
from shared.data.pngs import read_pngs
from shared.training.files import atomic, make_dir

BATCH = 400       # images of a sheet, and of the published `--batches`
SHEET_COLUMNS = 20


def folder_name(epoch: int, kind: str, mode: str, steps: int, eta: float) -> str:
    """Return the published name, e.g. EMAgenerated_ep400_ddim_steps100_eta0.0."""
    if kind == "EDM":
        return f"EMAgenerated_ep{epoch}_edm_steps{steps}_eta{eta}"
    return f"EMAgenerated_ep{epoch}_ddpm" if mode == "DDPM" else f"EMAgenerated_ep{epoch}_ddim_steps{steps}_eta{eta}"


def png_path(folder: Path, number: int) -> Path:
    return folder / "pngs" / f"{number}.png"


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Make `folder` the place of images with these settings, which are recorded in `<folder>.json` beside it.

    Images that are there stay if they were made with the same settings. Otherwise raises UserError, or with `overwrite`
    deletes them.
    """
    record = folder.with_name(folder.name + ".json")
    settings = json.loads(json.dumps(settings))
    old = None
    if record.exists():
        try:
            old = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            old = None
    present = [*folder.glob("pngs/*.png"), *folder.glob("grid_*.png")]
    if present and overwrite:
        for path in present:
            path.unlink()
    elif present and old != settings:
        what = "of unknown origin" if not isinstance(old, dict) else f"of other settings ({_difference(old, settings)})"
        raise UserError(f"{folder} holds images {what}; move it away or add --overwrite")
    make_dir(folder / "pngs")
    with atomic(record, "w") as file:
        file.write(json.dumps(settings, indent=2) + "\n")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    key = next(key for key in [*new, *old] if old.get(key) != new.get(key))
    return f"{key} {str(old.get(key))[:40]} there, {str(new.get(key))[:40]} here"


def write_sheets(folder: Path, count: int) -> None:
    """Write grid_<batch>.png for every 400 of the `count` images, 20 in a row; sheets that are there stay."""
    for batch, start in enumerate(range(0, count, BATCH)):
        path = folder / f"grid_{batch}.png"
        if not path.exists():
            write_sheet(path, torch.from_numpy(read_images(folder, range(start, min(start + BATCH, count)))),
                        SHEET_COLUMNS)


def read_images(folder: Path, numbers: Sequence[int]) -> np.ndarray:
    """Return uint8 [N, C, H, W] of images that were written."""
    return read_pngs([png_path(folder, number) for number in numbers])


def write_archive(folder: Path, count: int) -> Path:
    """Write all images into `<folder>.npz` (array `images`, uint8 [N, C, H, W]) and return its path."""
    from shared.data.images import ImageSet
    from shared.data.writers import write_npz

    path = folder.with_name(folder.name + ".npz")
    write_npz(ImageSet(read_images(folder, range(count)), np.full(count, -1, np.int64), (), folder.name), path)
    return path
