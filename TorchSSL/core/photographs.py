"""ImageNet: photographs of any size, decoded when a batch asks for them, by threads or by NVIDIA DALI.

A photograph is augmented as it is and then made a square: strong views take RandAugment and cutout on the whole
photograph; all views are resized to 256x256 and later cut to 224x224. The evaluation resizes to 224x224.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.augment.views import StrongDraws, normalise, randaugment, strong
from shared.cli import UserError
from shared.data.datasets import list_imagenet
from shared.data.image_files import CLASS_FOLDER_SUFFIXES, class_folders, class_values, find_images, open_image, to_chw
from shared.data.images import ImageSet
from shared.data.parallel import cores, one_ahead
from shared.data.photograph_batches import choose_decoder
from shared.data.pool import Pool

SIDE, CROP = 256, 224  # of a training image before and after its crop; the second also of one that is evaluated


@dataclass(frozen=True, eq=False)
class PhotographSet:
    """Image files with their classes; what an ImageSet is to images that fit in memory.

    files: paths [N]. labels: int64 [N]. classes: names in label order. name: what messages call the set.
    """

    files: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    channels = 3
    size = (SIDE, SIDE)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def has_labels(self) -> bool:
        return bool((self.labels >= 0).any())

    def subset(self, indices: np.ndarray | Sequence[int] | slice) -> PhotographSet:
        """Return the photographs at `indices`, in that order."""
        return PhotographSet(self.files[indices], self.labels[indices], self.classes, self.name)

    def concatenate(self, other: PhotographSet) -> PhotographSet:
        """Return this set followed by `other`, which has the same classes."""
        return PhotographSet(np.concatenate((self.files, other.files)), np.concatenate((self.labels, other.labels)),
                             self.classes, self.name)

    def names_by_class(self) -> dict[str, list[str]]:
        """Return class -> file names, for a file that says what is labelled."""
        found: dict[str, list[str]] = {name: [] for name in self.classes}
        for file, label in zip(self.files.tolist(), self.labels.tolist(), strict=True):
            found[self.classes[label]].append(Path(file).name)
        return found


def imagenet(data_dir: str, split: str) -> PhotographSet:
    """Return `<data_dir>/imagenet/<train|val>/<class>/`; UserError where it is missing, empty or has other classes."""
    files, labels, classes = list_imagenet(data_dir, split)
    if not len(labels):
        raise UserError(f"{files.path}: no images in it; expected {files.path.name}/<class>/<file>.JPEG")
    if split != "train" and classes != (known := list_classes(data_dir)):
        other = sorted(set(classes) ^ set(known))
        raise UserError(f"{files.path}: the class {other[0]} is in only one of train and val; classes are numbered by "
                        "the order of their folders, so both must have the same")
    paths = np.array([f"{files.path}/{member.name}" for member in files.members])
    return PhotographSet(paths, labels, classes, "imagenet")


def list_classes(data_dir: str) -> tuple[str, ...]:
    folder = Path(data_dir) / "imagenet" / "train"
    return tuple(class_folders(folder)) if folder.is_dir() else ()


def extra_photographs(folder: Path, num_classes: int, classes: tuple[str, ...] | None) -> PhotographSet:
    """Return labelled photographs of `<folder>/<class>/`; UserError for a class that is none of the data set's."""
    names = class_folders(folder)
    values = class_values(folder, names, classes)
    if max(values.values(), default=0) >= num_classes:
        raise UserError(f"--aug_path {folder}: has class {max(values.values())}, there are only {num_classes} classes")
    members = [member.name for member in find_images(folder, CLASS_FOLDER_SUFFIXES).members if "/" in member.name]
    if not members:
        raise UserError(f"--aug_path {folder}: no images; expected <class>/<image>.png")
    labels = np.array([values[name.partition("/")[0]] for name in members], np.int64)
    return PhotographSet(np.array([f"{folder}/{name}" for name in members]), labels, classes or (), folder.name)


def make_pool(images: ImageSet | PhotographSet, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device,
              workers: int = 1, decoder: str = "auto") -> Pool | PhotographPool:
    """Return what batches of the set are drawn from."""
    if isinstance(images, PhotographSet):
        return PhotographPool(images, mean, std, device, workers, decoder)
    return Pool(images, mean, std, device)


class PhotographPool:
    """Photographs to draw batches from, with the interface of shared.data.pool.Pool; they are decoded batch by batch.

    workers: as --num_workers; four threads each. Raises UserError for a photograph that cannot be decoded.
    """

    def __init__(self, photographs: PhotographSet, mean: tuple[float, ...], std: tuple[float, ...],
                 device: torch.device, workers: int = 1, decoder: str = "auto") -> None:
        self.photographs, self.mean, self.std, self.device = photographs, mean, std, device
        self.labels = torch.from_numpy(photographs.labels).to(device)
        self.threads = ThreadPoolExecutor(min(4 * max(1, workers), 4 * cores()))
        # On a CPU both decode alike; DALI is for the decoders of a GPU.
        by_dali = decoder == "dali" or (decoder == "auto" and device.type == "cuda")
        self.dali = None
        if by_dali and choose_decoder(decoder) == "dali":
            from shared.data.dali import Decoder

            self.dali = Decoder(device, 4 * max(1, workers))
        self.last: tuple[np.ndarray, list[Tensor]] = (np.zeros(0, np.int64), [])

    def __len__(self) -> int:
        return len(self.photographs)

    def decode(self, positions: np.ndarray) -> list[Tensor]:
        """Return uint8 [3, H, W] each; those of the last call are still there, since views follow each other."""
        if not np.array_equal(self.last[0], positions):
            files = self.photographs.files[positions].tolist()
            decoded = self.dali(list(self.threads.map(read, files)), files) if self.dali else list(
                self.threads.map(lambda file: decode(read(file), file), files))
            self.last = (positions.copy(), decoded)
        return self.last[1]

    def squares(self, positions: np.ndarray, side: int, change: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return uint8 [n, 3, side, side] on the device: change(photograph [1, 3, H, W], number in the batch)."""
        decoded = self.decode(positions)
        made = self.threads.map(lambda number: resize(change(decoded[number][None], number), side),
                                range(len(decoded)))
        return torch.cat(list(made)).to(self.device, non_blocking=True)

    def take(self, positions: np.ndarray) -> Tensor:
        """Return uint8 [n, 3, 256, 256] on the device."""
        return self.squares(positions, SIDE, lambda image, number: image)

    def normalised(self, positions: np.ndarray) -> Tensor:
        """Return the images as the evaluation sees them: float32 [n, 3, 224, 224], normalised."""
        return normalise(self.squares(positions, CROP, lambda image, number: image), self.mean, self.std)

    def strong(self, positions: np.ndarray, draws: StrongDraws) -> Tensor:
        """Return strong views before flip and crop, uint8 [n, 3, 256, 256]. draws: for images of 256x256."""
        return self.squares(positions, SIDE, lambda image, number: strong(image, fitted(draws, number, image)))

    def medium(self, positions: np.ndarray, draws: StrongDraws) -> Tensor:
        """Return views with the operations alone, uint8 [n, 3, 256, 256]."""
        return self.squares(positions, SIDE, lambda image, number: randaugment.apply(
            image, draws.operations[number:number + 1], draws.magnitudes[number:number + 1]))


def read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def decode(payload: bytes, file: str) -> Tensor:
    return torch.from_numpy(to_chw(open_image(payload, file), 3).copy())


def resize(images: Tensor, side: int) -> Tensor:
    """Resize uint8 [n, 3, H, W] to squares as Pillow does (bilinear, antialiased), within one grey level."""
    if images.device.type == "cpu":
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    small = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def fitted(draws: StrongDraws, number: int, image: Tensor) -> StrongDraws:
    """Return the draws of one image with the centre of its cutout moved to where it would be in this image's size."""
    one, (height, width) = draws[number:number + 1], image.shape[-2:]
    share = (SIDE - one.cutout_centre) / (SIDE - 1)  # 0..1 from the far side back to the first pixel
    sides = np.array([width, height])
    return StrongDraws(one.operations, one.magnitudes, one.cutout_fraction, sides + (1 - sides) * share)


class Ahead:
    """Makes the batch of the next step while the network works on this one."""

    def __init__(self, batches: Callable[[int], object], last: int) -> None:
        self.batches, self.last = batches, last
        self.thread = ThreadPoolExecutor(1)
        self.following: tuple[int, object] | None = None

    def __call__(self, step: int) -> object:
        future = self.following[1] if self.following and self.following[0] == step else self.thread.submit(
            self.batches, step)
        batch = future.result()
        if step < self.last:
            self.following = (step + 1, self.thread.submit(self.batches, step + 1))
        return batch


def evaluated(pool: Pool | PhotographPool, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Yield the normalised images at each part's positions; photographs are decoded while the others are looked at."""
    made = (pool.normalised(part) for part in parts)
    return one_ahead(made) if isinstance(pool, PhotographPool) else made
