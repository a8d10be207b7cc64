"""Images per second of weak and strong augmentation: per-sample PIL transforms against one batch, on one core.

    python -m tests.bench.augment

One batch is a FreeMatch step's: weak views of 64 labelled and 448 unlabelled images, strong views of the 448. The slow
path is the usual one, torchvision's transforms on PIL images; loading and worker processes are left out of it. Exit
status 1 where the ratio is below the bar.
"""
from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import transforms

from shared.augment.randaugment import OPERATIONS, RANGES
from shared.augment.views import draw_strong, draw_weak, strong, weak
from shared.training.randomness import numpy_rng
from tests.shared.test_augment import in_pillow

LABELED, UNLABELED, SIZE = 64, 448, 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
BAR = 8.0


def randaugment_in_pillow(image: Image.Image) -> Image.Image:
    """Three operations and Cutout on one image."""
    for name in random.choices(OPERATIONS, k=3):
        image = in_pillow(image, name, random.uniform(*RANGES[name]))
    side = random.uniform(0, 0.5) * SIZE
    x0, y0 = (int(max(0, np.random.uniform(SIZE) - side / 2)) for _ in range(2))
    image = image.copy()
    ImageDraw.Draw(image).rectangle((x0, y0, min(SIZE, x0 + side), min(SIZE, y0 + side)), (125, 123, 114))
    return image


def slow_path(images: np.ndarray) -> Callable[[], object]:
    """images: uint8 [N, H, W, C]. Return the per-sample pipeline on one batch."""
    weak_transform = transforms.Compose([
        transforms.RandomHorizontalFlip(), transforms.RandomCrop(SIZE, padding=4, padding_mode="reflect"),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        pictures = [Image.fromarray(image) for image in images]
        return (torch.stack([weak_transform(picture) for picture in pictures]),
                torch.stack([weak_transform(randaugment_in_pillow(picture)) for picture in pictures[LABELED:]]))
    return batch


def fast_path(images: np.ndarray) -> Callable[[], object]:
    """images: uint8 [N, H, W, C]. Return the batched pipeline, draws included."""
    on_device = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    rng, size = numpy_rng(0, 0, "augment"), (SIZE, SIZE)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        once = weak(on_device, draw_weak(len(images), rng, size), MEAN, STD)
        twice = strong(on_device[LABELED:], draw_strong(UNLABELED, rng, size))
        return once, weak(twice, draw_weak(UNLABELED, rng, size), MEAN, STD)
    return batch


def seconds(batch: Callable[[], object], repeats: int) -> float:
    """Return the best time of one call: what other processes take away is not the pipeline's."""
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        batch()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> int:
    torch.set_num_threads(1)
    images = numpy_rng(0, 0, "images").integers(0, 256, (LABELED + UNLABELED, SIZE, SIZE, 3), dtype=np.uint8)
    slow, fast = seconds(slow_path(images), 5), seconds(fast_path(images), 20)
    views = LABELED + 2 * UNLABELED
    print(f"per-sample PIL: {views / slow:,.0f} images/s; batched: {views / fast:,.0f} images/s; "
          f"ratio {slow / fast:.1f} (bar {BAR:g})")
    return 0 if slow / fast >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
