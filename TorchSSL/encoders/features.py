"""Features of images by a frozen encoder: computed once, kept in one file, memory-mapped when read.

A file is a torch.save of `embs` float32 [N, D], `labs` int64 [N] (-1 unknown) and `fnames`, as published, and of
`classes`, `encoder` and `images`: the class names, and fingerprints of what it was made from.
"""
from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared import distributed
from shared.augment.views import normalise
from shared.cli import UserError
from shared.data.cache import fill_arrays
from shared.data.images import ImageSet
from shared.data.photographs import MEAN, STD, PhotographSet, open_rgb
from shared.data.pool import dali_decoder
from shared.data.safe import read_file
from shared.distributed import World
from shared.parallel import cores, one_ahead
from shared.training.checkpoint import READ_ERRORS
from shared.training.files import atomic, cache_folder
from shared.training.precision import autocast, to_device
from TorchSSL.encoders.encoder import CentralView, Encoder

NO_WORLD = World()


@dataclass(frozen=True, eq=False)
class Features:
    """One row an image.

    values: float32 [N, D], memory-mapped. labels: int64 [N], -1 unknown. classes: names in label order. names: of the
    images, relative to their folder, or their numbers in an ImageSet. encoder, images: fingerprints; "" if the file
    says nothing of them.
    """

    values: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    names: list[str]
    encoder: str = ""
    images: str = ""

    def __len__(self) -> int:
        return len(self.values)


def features_of(source: ImageSet | PhotographSet, encoder: Encoder, path: str | Path | None = None,
                world: World = NO_WORLD, batch: int = 64, workers: int | None = None, decoder: str = "auto",
                precision: str = "fp32", overwrite: bool = False) -> Features:
    """Return the features of all images, in their order: those in the file `path`, or computed now and written to it.

    path: None for a file in the cache folder, which the same images and encoder share. world: the ranks share the
    images, and all get the result. batch: images at a time on each rank. workers: threads that decode; None: one a
    core. decoder: as in shared.data.pool; "auto" is DALI on a GPU. precision: fp32, or bf16 to be faster. An
    interrupted call is continued by the next. Raises UserError for a file made of other images or by another encoder,
    unless `overwrite`, and for photographs that cannot be read.
    """
    made_from = distributed.on_main(lambda: (encoder.fingerprint + ("" if precision == "fp32" else f" {precision}"),
                                             source.fingerprint), world)
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:24]
    file = Path(path) if path is not None else cache_folder() / "features" / f"{digest}.pth"
    if distributed.on_main(lambda: not _is_of(file, source, made_from, overwrite), world):
        _compute(source, encoder, file, digest, made_from, world, batch, workers or cores(), decoder, precision)
    return read_features(file)


def read_features(path: str | Path) -> Features:
    """Return the features in a file, memory-mapped; UserError for a file of anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        values, labels = content["embs"].numpy(), content["labs"].numpy()
        names = list(content.get("fnames") or map(str, range(len(values))))
        found = Features(values, labels, tuple(content.get("classes", ())), names, str(content.get("encoder", "")),
                         str(content.get("images", "")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of features") from None
    except (*READ_ERRORS, torch.serialization.pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cut short or not a file of features ({type(error).__name__}); remove it to make it "
                        "anew") from None
    if values.ndim != 2 or values.dtype != np.float32 or not len(values) == len(labels) == len(names):
        raise UserError(f"{path}: expected float32 rows with as many labels and names; remove it to make it anew")
    return found


def names_of(source: ImageSet | PhotographSet) -> list[str]:
    return source.names if isinstance(source, PhotographSet) else list(map(str, range(len(source))))


def _is_of(file: Path, source: ImageSet | PhotographSet, made_from: tuple[str, str], overwrite: bool) -> bool:
    """Return whether there is a file of these images by this encoder; UserError if it is of others."""
    if not file.exists():
        return False
    try:
        found = read_features(file)
        if not found.encoder and found.names == names_of(source):
            warnings.warn(f"{file} does not say which encoder made it; it is taken as it is", stacklevel=3)
            return True
        other = [what for what, theirs, ours in zip(("another encoder", "other images"), (found.encoder, found.images),
                                                    made_from, strict=True) if theirs != ours]
        if other:
            raise UserError(f"{file}: holds features of {' and '.join(other)}")
    except UserError as error:
        if overwrite:
            print(f"{error}: it is made anew", flush=True)
            return False
        raise UserError(f"{error}; give --overwrite to make it anew, or remove it") from None
    print(f"complete: {file}", flush=True)
    return True


def _compute(source: ImageSet | PhotographSet, encoder: Encoder, file: Path, digest: str, made_from: tuple[str, str],
             world: World, batch: int, workers: int, decoder: str, precision: str) -> None:
    encoder.net.to(world.device)

    def make(parts: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        photographs = isinstance(source, PhotographSet)
        images = decoded(source, encoder.view, parts, world.device, workers, decoder) if photographs else (
            to_device(source.images[part], world.device) for part in parts)
        encode = encoder if photographs else encoder.of_pixels
        for part in images:
            with autocast(world.device, precision):
                values = encode(part).float().cpu().numpy()
            if not np.isfinite(values).all():
                raise UserError(f"{encoder.name}: its features are not finite; its weights are of no use")
            yield {"values": values}

    rows = file.with_name(f".{file.name}.{digest}.npy")
    fill_arrays({"values": rows}, {"values": (len(source), encoder.width)}, make, batch, world,
                f"features of {source.name}")
    if world.main:
        values = torch.from_numpy(np.load(rows, mmap_mode="c"))
        with atomic(file) as stream:
            torch.save({"embs": values, "labs": torch.from_numpy(source.labels), "fnames": names_of(source),
                        "classes": list(source.classes), "encoder": made_from[0], "images": made_from[1]}, stream)
        rows.unlink()
    distributed.barrier(world)


def decoded(photographs: PhotographSet, view: CentralView, parts: Sequence[np.ndarray], device: torch.device,
            workers: int, decoder: str) -> Iterator[Tensor]:
    """Yield the photographs at each part's positions as an encoder sees them: float32 [n, 3, size, size], normalised by
    ImageNet's mean and std. Each part is decoded while the caller works on the one before."""
    decode = dali_decoder(decoder, device, workers)

    def make(part: np.ndarray) -> Tensor:
        files = photographs.files[part].tolist()
        payloads = pool.map(read_file, files)
        if decode is None:
            seen = pool.map(lambda payload, file: view(open_rgb(payload, file)), payloads, files)
            return torch.from_numpy(np.stack(list(seen)).transpose(0, 3, 1, 2))
        return torch.stack([view.of_tensor(image) for image in decode(list(payloads), files)])

    with ThreadPoolExecutor(workers) as pool:
        for pixels in one_ahead(map(make, parts)):
            yield normalise(to_device(pixels, device), MEAN, STD)
