"""Images seen by a detector: one pass that keeps moments, and features only for metrics that need every one; the npz of
statistics that EDM published; and the metrics computed from both.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from EDM.metrics import metrics
from EDM.metrics.detectors import Detector
from EDM.metrics.metrics import Moments
from EDM.metrics.sources import Source
from EDM.training.published import local_file
from shared.cli import UserError, nearest
from shared.cpu.allocator import keep_freed_memory
from shared.data.classes import match_labels
from shared.data.safe import READ_ERRORS, zip_members
from shared.distributed import World, gather
from shared.training.files import atomic, make_dir
from shared.training.progress import Progress
from shared.training.randomness import split_batches

MAX_BYTES = 1 << 36  # of one array: features of 8 million images


# ---------------------------------------------------------------- extraction

@dataclass(frozen=True)
class Extraction:
    """The result of a pass. The moments are those of all ranks; rank 0 alone keeps the arrays, on its CPU.

    features: float32 [N, F], logits: float32 [N, classes], labels: int64 [N], in the order of the images, or None.
    classes: names in label order, or (). size: height and width of the images.
    """

    moments: Moments
    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None


def extract(source: Source, detector: Detector, batch: int, world: World, *, keep_features: bool = False,
            keep_logits: bool = False) -> Extraction:
    """Show every image of `source` to the detector once, the ranks sharing the work.

    Held in memory: the moments (8 (F + 1)^2 bytes), a batch and the few that are being decoded; with keep_features
    4 N F bytes more, with keep_logits 4 N classes. Raises UserError for features that are not finite.
    """
    device = detector.device
    if device.type == "cpu":
        keep_freed_memory()
    moments = Moments(detector.num_features, device)
    kept = {}
    if keep_features:
        kept = {"features": torch.empty(len(source) if world.main else 0, detector.num_features),
                "labels": torch.empty(len(source) if world.main else 0, dtype=torch.int64)}
    if keep_logits:
        kept["logits"] = torch.empty(len(source) if world.main else 0, detector.num_logits)
    parts = split_batches(range(len(source)), batch, world.size)
    size: tuple[int, int] | None = None
    counter = Progress(f"features of {detector.name}", len(source), "images", shown=world.main)
    for turn, (images, labels) in enumerate(source.batches(parts[world.rank::world.size])):
        size = tuple(images.shape[2:]) if len(images) else size
        # One memory layout for all sources: another layout uses another kernel, which rounds differently.
        features, logits = _detect(detector, images.to(device).contiguous())
        if not features.isfinite().all():
            raise UserError(f"{detector.name} gave features that are not finite numbers: check --detector")
        moments.add(features)
        rows = {"features": features, "labels": labels.to(device), "logits": logits}
        together = parts[turn * world.size:(turn + 1) * world.size]
        for name, store in kept.items():
            found = _of_all_ranks(rows[name], [len(part) for part in together], world)
            if world.main:
                store[together[0][0]:together[0][0] + len(found)] = found.cpu()
        counter.advance(sum(map(len, together)))
    counter.close()
    classes = tuple(getattr(source, "classes", ()))
    return Extraction(moments.over_ranks(world), **(kept if world.main else {}), classes=classes, size=size)


def _detect(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor | None]:
    if len(images):
        return detector(images)
    logits = torch.zeros(0, detector.num_logits, device=images.device) if detector.num_logits else None
    return torch.zeros(0, detector.num_features, device=images.device), logits


def _of_all_ranks(rows: Tensor, sizes: Sequence[int], world: World) -> Tensor:
    """Return the rows of all ranks, one rank after another; rank r has sizes[r]."""
    if world.size == 1:
        return rows
    padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(sizes) - len(rows)))
    return torch.cat([part[:size] for part, size in zip(gather(padded, world).split(max(sizes)), sizes, strict=True)])


# ---------------------------------------------------------------- statistics of a reference

@dataclass(frozen=True)
class Reference:
    """mu: float64 [F]; sigma: float64 [F, F]; features float32 [N, F] and labels int64 [N], if they were asked for.

    count: number of images; None if the file does not say, as those of the published code. classes: names in label
    order, or (). size: height and width of the images; None if the file does not say.
    """

    mu: Tensor
    sigma: Tensor
    count: int | None
    source: str
    features: Tensor | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None


def from_extraction(extraction: Extraction, source: str) -> Reference:
    """Return the statistics of images that a detector has seen."""
    mu, sigma = extraction.moments.mean_and_covariance()
    return Reference(mu.cpu(), sigma.cpu(), extraction.moments.count, source, extraction.features, extraction.labels,
                     extraction.classes, extraction.size)


def write_reference(path: str, reference: Reference, detector: Detector) -> None:
    """Write the npz: the keys mu and sigma of the published files, and beside them where the numbers come from."""
    arrays: dict[str, Any] = {
        "mu": reference.mu.numpy(), "sigma": reference.sigma.numpy(), "num_images": reference.count,
        "detector": detector.name, "detector_sha256": detector.sha256, "resize": detector.resize}
    if reference.size is not None:
        arrays["image_size"] = np.array(reference.size)
    if reference.features is not None:
        arrays |= {"features": reference.features.numpy(), "labels": reference.labels.numpy(),
                   "classes": np.array(reference.classes, np.str_)}
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
        raise UserError(f"{path} is cut short or holds more than plain arrays ({error})") from None
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"{path} has no arrays mu and sigma (it has {', '.join(arrays) or 'nothing'}); "
                        "make it with: fid.py ref")
    mu, sigma = (np.asarray(arrays[name]) for name in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or "f" not in mu.dtype.kind + sigma.dtype.kind:
        raise UserError(f"{path}: expected mu [F] and sigma [F, F] of floats, got {list(mu.shape)} and "
                        f"{list(sigma.shape)}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: mu or sigma holds numbers that are not finite")
    _check_fits(path, arrays, len(mu), detector)
    count = int(arrays["num_images"]) if "num_images" in arrays else None
    features, labels = (torch.from_numpy(arrays[name]) if name in arrays else None for name in ("features", "labels"))
    return Reference(torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)), count,
                     str(path), features, labels, tuple(map(str, arrays.get("classes", ()))),
                     tuple(arrays["image_size"].ravel().tolist()) if "image_size" in arrays else None)


def _check_fits(path: str, arrays: dict[str, np.ndarray], width: int, detector: Detector) -> None:
    made_with = str(arrays.get("detector", "another detector"))
    if width != detector.num_features:
        raise UserError(f"{path} has {width} features ({made_with}), {detector.name} has "
                        f"{detector.num_features}; name its detector with --detector")
    if "detector_sha256" in arrays and str(arrays["detector_sha256"]) != detector.sha256:
        raise UserError(f"{path} was made with other weights ({made_with}, SHA-256 "
                        f"{str(arrays['detector_sha256'])[:12]}) than --detector {detector.file} "
                        f"({detector.name}, {detector.sha256[:12]})")
    for name, shape in (("features", (None, width)), ("labels", (None,))):
        if name in arrays and (arrays[name].ndim != len(shape) or arrays[name].shape[1:] != shape[1:]):
            raise UserError(f"{path}: its array {name} has the shape {list(arrays[name].shape)}; make "
                            "the file anew with: fid.py ref")


# ---------------------------------------------------------------- scores

NEED_FEATURES = {"kid", "prdc", "cwfid", "cwprdc"}


class MetricNames:
    """Type of an option: comma-separated names of metrics. known: name -> meaning."""

    metavar, range = "LIST", ""

    def __init__(self, known: Mapping[str, str]) -> None:
        self.known = known
        self.help = "comma-separated: " + "; ".join(f"{name}, {text}" for name, text in known.items())

    def convert(self, text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.lower().split(",")))
        for name in names:
            if name not in self.known:
                raise ValueError(f'unknown metric "{name}"{nearest(name, self.known)}; known: {", ".join(self.known)}')
        return names



def score(names: Sequence[str], generated: Extraction, reference: Reference, detector: Detector,
          settings: SimpleNamespace) -> dict[str, Any]:
    """Return the values of the metrics `names` in this order, under their names in result files.

    names: fid, kid, prdc, isc, and of each class cwfid, cwprdc. settings: kid_subsets, kid_subset_size, pr_k, dc_k,
    isc_splits, as far as needed.
    """
    values: dict[str, Any] = {}
    device, distance = generated.moments.sums.device, "fid" if detector.kind == "inception" else f"fd_{detector.kind}"
    if NEED_FEATURES & set(names):
        ours, real = generated.features.to(device), reference.features.to(device)
    if {"cwfid", "cwprdc"} & set(names):
        matched = match_labels(generated.labels.numpy(), generated.classes, reference.classes, "the generated images")
        labels, real_labels = torch.from_numpy(matched).to(device), reference.labels.to(device)
    for name in names:
        if name == "fid":
            mu, sigma = generated.moments.mean_and_covariance()
            values[distance] = metrics.frechet_distance(mu, sigma, reference.mu.to(device), reference.sigma.to(device))
        elif name == "kid":
            values["kid"], values["kid_std"] = metrics.kernel_distance(ours, real, settings.kid_subsets,
                                                                       settings.kid_subset_size)
        elif name == "prdc":
            values |= vars(metrics.manifold_metrics(ours, real, settings.pr_k, settings.dc_k))
        elif name == "isc":
            values["isc"], values["isc_std"] = metrics.inception_score(generated.logits, settings.isc_splits)
        elif name == "cwfid":
            each = metrics.classwise_frechet_distance(ours, labels, real, real_labels)
            values[f"class_wise_{distance}"] = each.mean().item()
            values[f"class_wise_{distance}_by_class"] = each.tolist()
        elif name == "cwprdc":
            each = [vars(metrics.manifold_metrics(ours[labels == label], real[real_labels == label], settings.pr_k,
                                                  settings.dc_k)) for label in range(int(real_labels.max()) + 1)]
            for key in each[0]:
                values[f"class_wise_{key}"] = sum(found[key] for found in each) / len(each)
                values[f"class_wise_{key}_by_class"] = [found[key] for found in each]
    return values


def full_precision() -> None:
    """Compute features in fp32 proper: tensor cores' TF32 moves distances in the third digit."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
