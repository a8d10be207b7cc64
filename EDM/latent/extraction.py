"""From photographs to latents: ADM's centre crop, the VAE's moments of each image and its mirror image, one array."""
from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from EDM.latent.latents import ABOUT, LABELS, MOMENTS
from EDM.latent.vae import Coder, SpaceToDepth
from shared.cli import UserError
from shared.data.cache import fill_arrays
from shared.data.images import open_image
from shared.data.photographs import PhotographSet
from shared.distributed import World, on_main
from shared.parallel import cores, one_ahead
from shared.training.files import write_array, write_json
from shared.training.precision import to_device


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """Return the central square of `side` pixels: halved while that leaves enough, then resized, then cropped.

    Dhariwal and Nichol 2021 (arXiv 2105.05233).
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def training_image(image: Image.Image, side: int) -> np.ndarray:
    """Return float32 [3, side, side] in [-1, 1]."""
    pixels = np.asarray(centre_crop(image.convert("RGB"), side))
    return pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1


def published_rows(count: int, batch: int, mirror: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return which image each row holds, int64 [2 count], and whether it is the mirror image, bool [2 count].

    Each batch of images is followed by the batch of its mirror images. mirror: False: rows are the images alone.
    """
    if not mirror:
        return np.arange(count), np.zeros(count, bool)
    starts = range(0, count, batch)
    images = [np.arange(start, min(start + batch, count)) for start in starts]
    return (np.concatenate([np.tile(part, 2) for part in images]),
            np.concatenate([np.repeat([False, True], len(part)) for part in images]))


def batch_of(resolution: int) -> int:
    """Return the number of images at a time, which decides the order of rows."""
    return 64 if resolution >= 512 else 128


def pseudo_labels_of(photographs: PhotographSet, known: Mapping[str, int]) -> np.ndarray:
    """Return the pseudo-label of each photograph: int64 [N].

    known: relative path, or file name alone, as in the published files -> label. Raises UserError for a photograph
    without one and for labels beyond the classes; warns of classes that no photograph has.
    """
    labels = np.empty(len(photographs), np.int64)
    for number, name in enumerate(photographs.names):
        label = known.get(name, known.get(name.rpartition("/")[2]))
        if label is None:
            raise UserError(f"{photographs.root}/{name} has no pseudo-label; run train_classifier.py with "
                            "--func=get_all_features, then --func=get_cluster, on the images that are there now")
        labels[number] = label
    if labels.min() < 0 or labels.max() >= photographs.num_classes:
        raise UserError(f"the pseudo-labels go up to {labels.max()}, but {photographs.root} has "
                        f"{photographs.num_classes} classes; run train_classifier.py --func=get_cluster anew")
    counts = np.bincount(labels, minlength=photographs.num_classes)
    if not counts.all():
        absent = [photographs.classes[label] for label in np.flatnonzero(counts == 0)]
        warnings.warn(f"no image has the pseudo-label {', '.join(absent[:5])} ({len(absent)} such classes): the model "
                      "cannot learn them", stacklevel=2)
    return labels


def extract(photographs: PhotographSet, labels: np.ndarray, coder: Coder | SpaceToDepth, folder: Path,
            resolution: int, world: World, dtype: type = np.float32, mirror: bool = True) -> None:
    """Write the latents of all photographs and, with `mirror`, of their mirror images, each rank its part; an
    interrupted call is continued by the next."""
    images, mirrored = published_rows(len(photographs), batch_of(resolution), mirror)
    side = resolution // coder.factor
    coder.to(world.device)

    def make(parts: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for rows, pixels in zip(parts, one_ahead(_decoded(photographs, parts, images, resolution)), strict=True):
            pixels = to_device(pixels, world.device)
            flip = to_device(mirrored[rows], world.device)[:, None, None, None]
            moments = coder.moments(torch.where(flip, pixels.flip(3), pixels)).cpu().numpy()
            if not np.isfinite(moments).all():
                raise UserError("the VAE's moments are not finite; its weights are of no use")
            yield {"moments": moments.astype(dtype)}

    shape = (len(images), 2 * coder.channels, side, side)
    fill_arrays({"moments": folder / MOMENTS}, {"moments": shape}, make, 2 * batch_of(resolution), world, "latents",
                dtype)
    on_main(lambda: _describe(folder, labels[images], photographs.classes, coder, resolution), world)


def _decoded(photographs: PhotographSet, parts: Sequence[np.ndarray], images: np.ndarray, resolution: int
             ) -> Iterator[np.ndarray]:
    """Yield the images of each part of the rows, float32 [n, 3, R, R]; those that occur twice are decoded once."""
    with ThreadPoolExecutor(cores()) as pool:
        for rows in parts:
            wanted, places = np.unique(images[rows], return_inverse=True)
            found = pool.map(lambda number: read_image(photographs.files[number], resolution), wanted)
            yield np.stack(list(found))[places]


def read_image(file: str, resolution: int) -> np.ndarray:
    """Return the training image of a file, float32 [3, R, R]; UserError naming it."""
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return training_image(open_image(data, str(file)), resolution)


def _describe(folder: Path, labels: np.ndarray, classes: Sequence[str], coder: Coder | SpaceToDepth, resolution: int
              ) -> None:
    write_array(folder / LABELS, labels)
    write_json(folder / ABOUT, {"classes": list(classes), "scale": coder.scale, "coder": coder.fingerprint,
                                "resolution": resolution})
