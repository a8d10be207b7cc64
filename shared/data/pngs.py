"""PNG files of generated images: written in threads, each complete or absent."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.training.files import atomic

WRITERS = 8  # threads; compressing a PNG releases the interpreter lock


class PngWriter:
    """Writes images in threads while the next ones are computed. Each file appears complete or not at all.

    A context manager: leaving it waits for all files, and an error of any of them is raised here or in `save`.
    """

    def __enter__(self) -> PngWriter:
        self._pool = ThreadPoolExecutor(WRITERS)
        self._pending: list[Future] = []
        return self

    def save(self, images: Iterable[tuple[Path, np.ndarray]]) -> None:
        """Queue uint8 images [C, H, W], C = 1 or 3, for writing, once the former call's are written."""
        self._wait()
        self._pending = [self._pool.submit(write_png, path, pixels) for path, pixels in images]

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=kind is not None)

    def _wait(self) -> None:
        for future in self._pending:
            future.result()


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [C, H, W] as an L (C = 1) or RGB (C = 3) PNG."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    with atomic(path) as file:
        image.save(file, format="png")


def read_pngs(paths: Sequence[Path]) -> np.ndarray:
    """Read images of one size as uint8 [N, C, H, W]."""
    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor(WRITERS) as pool:
        return np.stack(list(pool.map(read, paths)))
