"""Images by number, and their files: image i is the same in any batch and for any number of processes."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.model import UNet, store_bf16_weights, use_channels_last
from EDM.sampling.files import read_record
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.data.images import ImageSet
from shared.data.writers import read_pngs, write_npz, write_png
from shared.training.files import make_dir, sweep, write_json
from shared.training.precision import autocast
from shared.training.randomness import torch_rng

# On a CPU, results differ in the last bit between batches of a few images (other matrix kernels) but not from here on,
# so smaller batches are filled up.
SMALLEST_CPU_BATCH = 16
BATCH = 400         # images of a sheet, and of the published `--batches`
SHEET_COLUMNS = 20


class ImageNoise:
    """Standard normal numbers of images, row i from a generator of (seed, items[i]): latents, then those of each step.

    Drawn on the host: the same on every device.
    """

    def __init__(self, seed: int, items: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self.generators = [torch_rng(seed, item, "sample") for item in items]
        self.shape, self.device = tuple(shape), device

    def latents(self) -> Tensor:
        """Return float32 [len(items), *shape] on the device."""
        rows = torch.empty(len(self.generators), *self.shape)
        for row, generator in zip(rows, self.generators, strict=True):
            row.normal_(generator=generator)
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def step(self, number: int) -> Tensor:
        """Return the numbers of a sampler's step; steps are asked for in order."""
        return self.latents()


class ImageSampler:
    """A network, a sampler and an arithmetic.

    mode, steps, eta: see DDPM.sample and EDM.sample. precision: fp32, bf16 or fp16. fast: the memory layout and
    allocator that are faster here. compile: the network first.
    """

    def __init__(self, net: UNet, diffusion: DDPM | EDM, *, mode: str = "DDIM", steps: int | None = None,
                 eta: float = 0.0, precision: str = "fp32", seed: int = 0, fast: bool = True, compile: bool = False
                 ) -> None:
        self.net, self.diffusion, self.mode, self.steps, self.eta = net, diffusion, mode, steps, eta
        self.precision, self.seed, self.device = precision, seed, next(net.parameters()).device
        if fast:
            use_channels_last(net)
            if precision == "bf16":
                store_bf16_weights(net)
            if self.device.type == "cpu":
                keep_freed_memory()
        if compile:
            net.compile()

    def rows(self, batch: int, count: int) -> int:
        """Return the batch size that the network must see for batches of at most `batch` among `count` images."""
        return max(batch, SMALLEST_CPU_BATCH) if self.device.type == "cpu" and count > 1 else batch

    @torch.inference_mode()
    def images(self, items: Sequence[int], rows: int | None = None) -> Tensor:
        """Return float images [len(items), C, H, W] in about [0, 1], not clamped.

        rows: batch size that the network sees; missing images are filled up. Raises UserError for an image that is not
        finite.
        """
        noise = ImageNoise(self.seed, items, self.net.image_shape, self.device)
        fill = max((rows or len(items)) - len(items), 0)

        def filled(numbers: Tensor) -> Tensor:
            return torch.cat([numbers, numbers.new_zeros(fill, *numbers.shape[1:])]) if fill else numbers

        with autocast(self.device, self.precision):
            made = self.diffusion.sample(self.net, filled(noise.latents()), lambda step: filled(noise.step(step)),
                                         self.mode, self.steps, self.eta)[:len(items)]
        finite = torch.isfinite(made).flatten(1).all(1)
        if not finite.all():
            raise UserError(f"image {items[finite.long().argmin().item()]} is not finite; try --precision fp32, "
                            "another sampler or another checkpoint")
        return made


# ---------------------------------------------------------------- pictures

def to_uint8(images: Tensor) -> Tensor:
    """Return pixel values uint8 of numbers in [0, 1] (others are clamped): rounded, halves up."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def sheet(images: Tensor, per_row: int) -> Tensor:
    """Arrange images [N, C, H, W] in rows, two black pixels between them: [3, H', W'], gray ones as RGB; one image
    stays as it is."""
    from torchvision.utils import make_grid  # takes as long to import as torch

    return make_grid(images, nrow=per_row)


def write_sheet(path: Path, images: Tensor, per_row: int) -> None:
    """Write images [N, 1 or 3, H, W], numbers in [0, 1] or uint8, as one PNG. The folder is made if needed."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    make_dir(path.parent)
    write_png(path, np.asarray(sheet(pixels, per_row).cpu()))


# ---------------------------------------------------------------- the folder of generated images

def folder_name(epoch: int, kind: str, mode: str, steps: int, eta: float) -> str:
    """Return the published name, e.g. EMAgenerated_ep400_ddim_steps100_eta0.0."""
    if kind == "EDM":
        return f"EMAgenerated_ep{epoch}_edm_steps{steps}_eta{eta}"
    return f"EMAgenerated_ep{epoch}_ddpm" if mode == "DDPM" else f"EMAgenerated_ep{epoch}_ddim_steps{steps}_eta{eta}"


def png_path(folder: Path, number: int) -> Path:
    return folder / "pngs" / f"{number}.png"


def claim(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Make `folder` the place of images with these settings, which are recorded in `<folder>.json` beside it.

    Images that are there stay if they were made with the same settings. Otherwise raises UserError, or with `overwrite`
    deletes them.
    """
    record = folder.with_name(folder.name + ".json")
    settings, old = json.loads(json.dumps(settings)), read_record(record)
    present = [*folder.glob("pngs/*.png"), *folder.glob("grid_*.png")]
    if present and overwrite:
        for path in (*present, archive_path(folder)):
            path.unlink(missing_ok=True)
    elif present and old is None:
        raise UserError(f"{folder} holds images of unknown origin; move it away or add --overwrite")
    elif present and old != settings:
        key = next(key for key in [*settings, *old] if old.get(key) != settings.get(key))
        raise UserError(f"{folder} holds images of other settings ({key} {str(old.get(key))[:40]} there, "
                        f"{str(settings.get(key))[:40]} here); move it away or add --overwrite")
    sweep(make_dir(folder / "pngs"), "*.png")
    sweep(folder, "*.png")
    sweep(folder.parent, f"{folder.name}.*")
    write_json(record, settings, indent=2)


def is_complete(folder: Path, count: int, archive: bool) -> bool:
    """Return whether the folder holds `count` images with their sheets, and with `archive` the .npz is beside it."""
    files = [png_path(folder, number) for number in range(count)]
    files += [folder / f"grid_{batch}.png" for batch in range(-(-count // BATCH))]
    if not all(path.exists() for path in files) or archive and not archive_path(folder).exists():
        return False
    if archive:
        with np.load(archive_path(folder)) as written:
            return len(written["images"]) == count
    return True


def read_images(folder: Path, numbers: Sequence[int]) -> np.ndarray:
    """Return uint8 [N, C, H, W] of images that were written."""
    return read_pngs([png_path(folder, number) for number in numbers])


def write_sheets(folder: Path, count: int) -> None:
    """Write grid_<batch>.png for every 400 of the `count` images, 20 in a row; sheets that are there stay."""
    for batch, start in enumerate(range(0, count, BATCH)):
        path = folder / f"grid_{batch}.png"
        if not path.exists():
            pixels = read_images(folder, range(start, min(start + BATCH, count)))
            write_sheet(path, torch.from_numpy(pixels), SHEET_COLUMNS)


def archive_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".npz")


def write_archive(folder: Path, count: int) -> Path:
    """Write all images into `<folder>.npz` (array `images`, uint8 [N, C, H, W]) and return its path."""
    path = archive_path(folder)
    images = read_images(folder, range(count))
    if (images == images[:, :1]).all():  # gray ones are written as RGB
        images = images[:, :1]
    write_npz(ImageSet(images, np.full(count, -1, np.int64), (), folder.name), path)
    return path
