"""What batches are drawn from: images on the device where they fit, and photographs that are decoded when asked for.

Photographs are decoded by NVIDIA DALI or by Pillow in threads, with the same pixels within one grey level.
"""
from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.augment import randaugment
from shared.augment.views import StrongDraws, normalise, strong, strong_photographs
from shared.cli import UserError
from shared.data.images import ImageSet, open_image, to_chw
from shared.data.photographs import (
    EVAL_SIDE,
    MEAN,
    STD,
    TRAIN_SIDE,
    Photographs,
    PhotographSet,
    Request,
    View,
    open_rgb,
)
from shared.data.safe import read_file
from shared.parallel import cores, one_ahead
from shared.training.precision import to_device

AHEAD = 2  # batches in the making
CANVAS_PIXELS = 2**25  # of a batch of photographs that a GPU augments together


class Pool:
    """uint8 images to draw batches from: on the device where they fit, else gathered on the host batch by batch.

    labels: int64 [N] on the device, -1 where unknown.
    """

    def __init__(self, images: ImageSet, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.host = images.images
        self.device = device
        self.labels = torch.from_numpy(np.ascontiguousarray(images.labels)).to(device)
        self.mean, self.std = mean, std
        self.resident = None
        if device.type != "cpu" and fits(self.host.nbytes, device):
            self.resident = torch.from_numpy(np.ascontiguousarray(self.host)).to(device)

    def __len__(self) -> int:
        return len(self.host)

    def take(self, indices: np.ndarray) -> Tensor:
        """Return uint8 [n, C, H, W] on the device; nothing waits for it."""
        if self.resident is not None:
            return self.resident[to_device(indices, self.device)]
        # A copy, since memory maps are read-only. Sorted reads would be faster only from spinning disks.
        return to_device(self.host[indices], self.device)

    def normalised(self, indices: np.ndarray) -> Tensor:
        """Return the images at `indices` as the evaluation sees them: float32 [n, C, H, W], normalised."""
        return normalise(self.take(indices), self.mean, self.std)


def fits(size: int, device: torch.device) -> bool:
    """Return whether `size` bytes leave at least half of the device's free memory to the training."""
    return device.type != "cuda" or size < torch.cuda.mem_get_info(device)[0] / 2


def make_pool(images: ImageSet | PhotographSet, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device,
              workers: int = 1, decoder: str = "auto") -> Pool | PhotographPool:
    """Return the pool of a set: a Pool or PhotographPool."""
    if isinstance(images, PhotographSet):
        return PhotographPool(images, mean, std, device, workers, decoder)
    return Pool(images, mean, std, device)


def evaluated(pool: Pool | PhotographPool, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Yield the normalised images at each part's positions; the next photographs are decoded meanwhile."""
    made = (pool.normalised(part) for part in parts)
    return one_ahead(made) if isinstance(pool, PhotographPool) else made


# --------------------------------------------------------------------------------------------------------- photographs

def choose_decoder(name: str) -> str:
    """Return "dali" or "torchvision": "auto" is DALI if installed. Raises UserError."""
    found = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if name == "dali" and not found:
        raise UserError("NVIDIA DALI is not installed: pip install nvidia-dali-cuda130, or decode with torchvision")
    return name if name != "auto" else "dali" if found else "torchvision"


def dali_decoder(name: str, device: torch.device, threads: int) -> Callable[..., list[Tensor]] | None:
    """Return shared.data.dali.Decoder, None for torchvision. "auto": both decode alike on a CPU, DALI is for GPUs."""
    if choose_decoder(name) != "dali" or name == "auto" and device.type != "cuda":
        return None
    from shared.data.dali import Decoder  # an optional package

    return Decoder(device, threads)


class PhotographPool:
    """Photographs to draw batches from, with the interface of Pool; they are decoded batch by batch.

    A photograph is augmented as it is and then made a square: strong views take RandAugment and cutout on the whole
    photograph; all views are resized to 256x256 and later cut to 224x224. The evaluation resizes to 224x224.

    workers: as --num_workers; four threads each. Raises UserError for a photograph that cannot be decoded.
    """

    def __init__(self, photographs: PhotographSet, mean: tuple[float, ...], std: tuple[float, ...],
                 device: torch.device, workers: int = 1, decoder: str = "auto") -> None:
        self.photographs, self.mean, self.std, self.device = photographs, mean, std, device
        self.labels = torch.from_numpy(photographs.labels).to(device)
        self.threads = ThreadPoolExecutor(min(4 * max(1, workers), 4 * cores()))
        self.dali = dali_decoder(decoder, device, 4 * max(1, workers))
        self.last: tuple[np.ndarray, list[Tensor]] = (np.zeros(0, np.int64), [])

    def __len__(self) -> int:
        return len(self.photographs)

    def take(self, positions: np.ndarray) -> Tensor:
        """Return uint8 [n, 3, 256, 256] on the device."""
        return self._squares(positions, TRAIN_SIDE, lambda image, number: image)

    def normalised(self, positions: np.ndarray) -> Tensor:
        """Return the images as the evaluation sees them: float32 [n, 3, 224, 224], normalised."""
        return normalise(self._squares(positions, EVAL_SIDE, lambda image, number: image), self.mean, self.std)

    def strong(self, positions: np.ndarray, draws: StrongDraws) -> Tensor:
        """Return strong views before flip and crop, uint8 [n, 3, 256, 256]. draws: for images of 256x256."""
        if self._decode(positions)[0].is_cuda:
            return self._on_canvas(positions, draws, with_cutout=True)
        return self._squares(positions, TRAIN_SIDE, lambda image, number: strong(
            image, _fitted(draws[number:number + 1], np.array([image.shape[2:]]))))

    def medium(self, positions: np.ndarray, draws: StrongDraws) -> Tensor:
        """Return views with the operations alone, uint8 [n, 3, 256, 256]."""
        if self._decode(positions)[0].is_cuda:
            return self._on_canvas(positions, draws, with_cutout=False)
        return self._squares(positions, TRAIN_SIDE, lambda image, number: randaugment.apply(
            image, draws.operations[number:number + 1], draws.magnitudes[number:number + 1]))

    def _on_canvas(self, positions: np.ndarray, draws: StrongDraws, with_cutout: bool) -> Tensor:
        """Return strong views of photographs on a GPU, whose time goes by operations and not by pixels."""
        decoded, made = self._decode(positions), []
        sizes = np.array([image.shape[1:] for image in decoded])
        for part in canvases(sizes):
            views = strong_photographs(decoded[part], _fitted(draws[part], sizes[part]), with_cutout)
            made += [resize(view[None], TRAIN_SIDE) for view in views]
        return torch.cat(made)

    def _squares(self, positions: np.ndarray, side: int, change: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return uint8 [n, 3, side, side] on the device: change(photograph [1, 3, H, W], number in the batch)."""
        decoded = self._decode(positions)
        made = self.threads.map(lambda number: resize(change(decoded[number][None], number), side),
                                range(len(decoded)))
        return torch.cat(list(made)).to(self.device, non_blocking=True)

    def _decode(self, positions: np.ndarray) -> list[Tensor]:
        """Return uint8 [3, H, W] each; those of the last call are kept, since several views follow each other."""
        if not np.array_equal(self.last[0], positions):
            files = self.photographs.files[positions].tolist()
            payloads = list(self.threads.map(read_file, files))
            decoded = self.dali(payloads, files) if self.dali else list(self.threads.map(_decode, payloads, files))
            self.last = (positions.copy(), decoded)
        return self.last[1]


def _decode(payload: bytes, file: str) -> Tensor:
    return torch.from_numpy(to_chw(open_image(payload, file), 3).copy())


def resize(images: Tensor, side: int) -> Tensor:
    """Resize uint8 [n, 3, H, W] to squares as Pillow does (bilinear, antialiased), within one grey level."""
    if images.device.type == "cpu":
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    small = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def canvases(sizes: np.ndarray) -> Iterator[slice]:
    """Yield parts of photographs with `sizes` [n, 2]: each one image, or a canvas of at most CANVAS_PIXELS."""
    start = 0
    for stop in range(1, len(sizes) + 1):
        following = sizes[start:stop + 1]
        if stop == len(sizes) or len(following) * following.max(0).prod() > CANVAS_PIXELS:
            yield slice(start, stop)
            start = stop


def _fitted(draws: StrongDraws, sizes: np.ndarray) -> StrongDraws:
    """Return the draws of n images with the centres of their cutouts scaled to `sizes` [n, 2]."""
    fraction = (TRAIN_SIDE - draws.cutout_centre) / (TRAIN_SIDE - 1)  # 0..1 from the far side back to the first pixel
    sides = sizes[:, ::-1]  # width, height
    return StrongDraws(draws.operations, draws.magnitudes, draws.cutout_fraction, sides + (1 - sides) * fraction)


# ------------------------------------------------------------------------------------------------------------- streams

def batches(photographs: Photographs, view: View, request: Callable[[int], Request], steps: range,
            device: torch.device, workers: int = 4, decoder: str = "auto") -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (float32 [n, 3, size, size] normalised, int64 [n]) on `device` for every step, made ahead of time.

    request: step -> which photographs it wants and how to crop them, so a run continues at any step with the same
    batches. workers: threads that decode. A view without crops gives the label -1 to the stand-in of a bad
    photograph. Raises UserError for photographs that cannot be used.
    """
    if choose_decoder(decoder) == "dali":
        from shared.data.dali import dali_batches  # an optional package

        return dali_batches(photographs, view, request, steps, device, workers, AHEAD)
    return pillow_batches(photographs, view, request, steps, device, workers)


def pillow_batches(photographs: Photographs, view: View, request: Callable[[int], Request], steps: range,
                   device: torch.device, workers: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Do as `batches`, with Pillow, in threads: it lets the others work while it decodes and resizes."""
    def make(wanted: Request, number: int) -> tuple[np.ndarray, int]:
        image, photograph = photographs.get(int(wanted.positions[number]), open_rgb)
        unknown = photograph.stands_in and wanted.crops is None
        return view(image, wanted.crops, number), -1 if unknown else photograph.label

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        pending: deque = deque()
        following = iter(steps)
        while True:
            for step in following:
                wanted = request(step)
                pending.append([pool.submit(make, wanted, number) for number in range(len(wanted.positions))])
                if len(pending) > AHEAD:
                    break
            if not pending:
                return
            pixels, labels = zip(*(future.result() for future in pending.popleft()), strict=True)
            images = to_device(np.stack(pixels).transpose(0, 3, 1, 2), device)
            yield normalise(images, MEAN, STD), to_device(np.array(labels), device)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
