"""Statistics of reference images in an npz: what EDM published (mu, sigma), and what tells whether they fit."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from EDM.metrics.detectors import Detector
from EDM.metrics.extraction import Extraction
from EDM.training.downloads import local_file
from shared.cli import UserError
from shared.data.archives import READ_ERRORS, zip_members
from shared.training.files import atomic, make_dir

MAX_BYTES = 1 << 36  # of one array: features of 8 million images


@dataclass(frozen=True)
class Reference:
    """mu: float64 [F]; sigma: float64 [F, F]; features float32 [N, F] and labels int64 [N] where they were asked for.

    count: number of images; None where a file does not say, as those of the published code.
    """

    mu: Tensor
    sigma: Tensor
    count: int | None
    source: str
    features: Tensor | None = None
    labels: Tensor | None = None

    def about(self) -> dict[str, Any]:
        return {"path": self.source, "images": self.count}


def from_extraction(extraction: Extraction, source: str) -> Reference:
    """Return the statistics of images that a detector has seen."""
    mu, sigma = extraction.moments.mean_and_covariance()
    return Reference(mu.cpu(), sigma.cpu(), extraction.moments.count, source, extraction.features, extraction.labels)


def write_reference(path: str, reference: Reference, detector: Detector) -> None:
    """Write the npz: the keys mu and sigma of the published files, and beside them where the numbers come from."""
    arrays: dict[str, Any] = {
        "mu": reference.mu.numpy(), "sigma": reference.sigma.numpy(), "num_images": reference.count,
        "detector": detector.name, "detector_sha256": detector.sha256, "resize": detector.resize}
    if reference.features is not None:
        arrays |= {"features": reference.features.numpy(), "labels": reference.labels.numpy()}
    make_dir(Path(path).absolute().parent)
    with atomic(path) as file:
        np.savez(file, **arrays)


def read_reference(path: str, detector: Detector) -> Reference:
    """Read an npz (path or URL) of ours or of the published code.

    Raises UserError if it is missing, damaged, without mu and sigma, or made with another detector than this.
    """
    file = local_file(path)
    zip_members(file, MAX_BYTES)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (*READ_ERRORS, MemoryError) as error:
        raise UserError(f"--ref: {path} is cut short or holds more than plain arrays ({error})") from None
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"--ref: {path} has no arrays mu and sigma (it has {', '.join(arrays) or 'nothing'}); "
                        "make it with: fid.py ref")
    mu, sigma = (np.asarray(arrays[name]) for name in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or "f" not in mu.dtype.kind + sigma.dtype.kind:
        raise UserError(f"--ref: {path}: expected mu [F] and sigma [F, F] of floats, got {list(mu.shape)} and "
                        f"{list(sigma.shape)}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"--ref: {path}: mu or sigma holds numbers that are not finite")
    _check_fits(path, arrays, len(mu), detector)
    count = int(arrays["num_images"]) if "num_images" in arrays else None
    features, labels = (torch.from_numpy(arrays[name]) if name in arrays else None for name in ("features", "labels"))
    return Reference(torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)), count,
                     str(path), features, labels)


def _check_fits(path: str, arrays: dict[str, np.ndarray], width: int, detector: Detector) -> None:
    made_with = str(arrays.get("detector", "another detector"))
    if width != detector.num_features:
        raise UserError(f"--ref: {path} has {width} features ({made_with}), {detector.name} has "
                        f"{detector.num_features}; name its detector with --detector")
    if "detector_sha256" in arrays and str(arrays["detector_sha256"]) != detector.sha256:
        raise UserError(f"--ref: {path} was made with other weights ({made_with}, SHA-256 "
                        f"{str(arrays['detector_sha256'])[:12]}) than --detector {detector.file} "
                        f"({detector.name}, {detector.sha256[:12]})")
    for name, shape in (("features", (None, width)), ("labels", (None,))):
        if name in arrays and (arrays[name].ndim != len(shape) or arrays[name].shape[1:] != shape[1:]):
            raise UserError(f"--ref: {path}: its array {name} has the shape {list(arrays[name].shape)}; make "
                            "the file anew with: fid.py ref")
