"""Files of generated images: folders of PNGs with their settings, archives, contact sheets."""
from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from EDM.sampling.conditions import Conditions
from shared.cli import UserError
from shared.data.images import ImageSet
from shared.data.writers import read_pngs, write_npz, write_png, write_zip
from shared.report.plots import image_grid
from shared.training.files import make_dir, sweep, write_json

RECORD = "generate.json"
ARCHIVES = (".zip", ".npz")
WRITERS = 8  # threads; compressing a PNG releases the interpreter lock
GRID_COLUMNS = 10
GRID_SIDE = 8  # of the square sheet of an unconditional model


@dataclass(frozen=True)
class Sample:
    """One image to make: its seed, its class (None: drawn from the seed, or an unconditional model), its file."""

    seed: int
    class_index: int | None
    path: Path


def plan_samples(folder: Path, seeds: Sequence[int], class_index: int | None, subdirs: bool) -> list[Sample]:
    """Return the samples of one folder: {seed:06d}.png, with `subdirs` in one sub-folder per thousand seeds."""
    def path(seed: int) -> Path:
        return (folder / f"{seed - seed % 1000:06d}" if subdirs else folder) / f"{seed:06d}.png"

    return [Sample(seed, class_index, path(seed)) for seed in dict.fromkeys(seeds)]


def class_folder(class_index: int, label_dim: int) -> str:
    """Return the folder name of a class: plain up to 10 classes, zero-padded beyond, to sort by class."""
    return f"{class_index:0{len(str(label_dim - 1))}d}"


def prepare_folder(folder: Path, settings: Mapping[str, Any], images: Sequence[Path], overwrite: bool) -> None:
    """Make `folder` the place of images with these settings, recorded in its generate.json.

    Existing images of the same settings stay. Others raise UserError, or with `overwrite` those among `images` are
    deleted.
    """
    settings = json.loads(json.dumps(settings))
    old = read_record(folder / RECORD)
    present = sorted(path.relative_to(folder) for path in folder.rglob("*.png")
                     if not path.name.startswith("grid-")) if folder.is_dir() else []
    wanted = {path.relative_to(folder) for path in images}
    clash = [path for path in present if path in wanted] if old is None else present
    if overwrite:
        others = [path for path in present if path not in wanted]
        if old is not None and old != settings and others:
            raise UserError(f"{folder} also holds {others[0]} of other settings ({_difference(old, settings)}), which "
                            "--overwrite does not replace; choose another --outdir")
        for path in images:
            path.unlink(missing_ok=True)
    elif clash and old is None:
        raise UserError(f"{folder} holds {clash[0]} of unknown origin; choose another --outdir or add --overwrite")
    elif clash and old != settings:
        raise UserError(f"{folder} holds images of other settings ({_difference(old, settings)}); choose another "
                        "--outdir or add --overwrite")
    make_dir(folder)
    for parent in {path.parent for path in images}:
        make_dir(parent)
        sweep(parent, "*.png")
    sweep(folder, RECORD)
    if old != settings:
        write_json(folder / RECORD, settings, indent=2)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the settings that are recorded in a file, or None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    key = next(key for key in [*new, *old] if old.get(key) != new.get(key))
    return f"{key} {_short(old.get(key))} there, {_short(new.get(key))} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 20 else text[:12] + "…"


def work_folder(archive: Path) -> Path:
    """Return the folder of an archive's images until it is complete."""
    return archive.with_name(archive.name + ".parts")


def archive_record(archive: Path) -> Path:
    return archive.with_name(archive.name + "." + RECORD)


def is_complete(archive: Path, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Return whether `archive` is already what `settings` (images included) describe; with `overwrite`, delete it.

    Raises UserError when it exists and holds something else.
    """
    if overwrite:
        archive.unlink(missing_ok=True)
    if not archive.exists():
        return False
    old = read_record(archive_record(archive))
    if old != json.loads(json.dumps(settings)):
        why = f" ({_difference(old, settings)})" if old else ""
        raise UserError(f"{archive} exists and holds something else{why}; choose another --outdir or add --overwrite")
    shutil.rmtree(work_folder(archive), ignore_errors=True)
    return True


def pack(archive: Path, samples: Sequence[Sample], labels: Sequence[int], trained: Conditions,
         settings: Mapping[str, Any]) -> None:
    """Move finished samples into an EDM dataset .zip or an .npz (images, labels, classes), in the order given."""
    numbers, vectors = np.asarray(labels, dtype=np.int64), None
    if trained.vectors is not None:
        numbers, vectors = np.full(len(samples), -1), trained.vectors.numpy()[numbers]
    names = trained.names or tuple(map(str, range(trained.label_dim)))
    images = ImageSet(read_pngs([sample.path for sample in samples]), numbers, names, archive.stem, vectors)
    write_json(archive_record(archive), settings, indent=2)
    (write_zip if archive.suffix == ".zip" else write_npz)(images, archive)
    shutil.rmtree(work_folder(archive))


def write_sheet(path: Path, samples: Sequence[Sample]) -> None:
    """Write the first n x n images, n = floor(sqrt(number)), row by row and without gaps, in the published form."""
    side = math.isqrt(len(samples))
    images = read_pngs([sample.path for sample in samples[:side**2]])  # [n², C, R, R]
    rows = [np.concatenate(list(images[start:start + side]), axis=2) for start in range(0, side**2, side)]
    write_png(path, np.concatenate(rows, axis=1))


def write_grid(path: Path, samples: Sequence[Sample], labels: Sequence[int]) -> None:
    """Write a contact sheet: a row of the first images per class, or a square of the first if labels are all -1."""
    rows: dict[str, list[Path]] = {}
    if set(labels) == {-1}:
        first = [sample.path for sample in samples[:GRID_SIDE**2]]
        rows = {str(row): first[i:i + GRID_SIDE] for row, i in enumerate(range(0, len(first), GRID_SIDE))}
    else:
        for label in sorted(set(labels)):
            members = [s.path for s, own in zip(samples, labels, strict=True) if own == label]
            rows[str(label)] = members[:GRID_COLUMNS]
    make_dir(path.absolute().parent)
    image_grid({name: read_pngs(paths) for name, paths in rows.items()}, path)
