"""Images by number: image i is the same whatever the batch it is made in and the number of processes."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.model import UNet, store_bf16_weights, use_channels_last
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.training.precision import autocast
from shared.training.randomness import torch_rng

# On a CPU, results differ in the last bit between batches of a few images (other matrix kernels) but not from here on,
# so smaller batches are filled up.
SMALLEST_CPU_BATCH = 16


class ImageNoise:
    """Standard normal numbers of images, row i from a generator of (seed, items[i]): latents, then those of each step.

    Drawn on the host, so that they are the same on every device.
    """

    def __init__(self, seed: int, items: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self.generators = [torch_rng(seed, item, "sample") for item in items]
        self.shape, self.device = tuple(shape), device

    def draw(self) -> torch.Tensor:
        """Return the next numbers, float32 [len(items), *shape] on the device."""
        rows = torch.empty(len(self.generators), *self.shape)
        for row, generator in zip(rows, self.generators, strict=True):
            row.normal_(generator=generator)
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def latents(self) -> torch.Tensor:
        return self.draw()

    def step(self, number: int) -> torch.Tensor:
        """Return the numbers of a sampler's step; steps are asked for in order."""
        return self.draw()


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
    def images(self, items: Sequence[int], rows: int | None = None) -> torch.Tensor:
        """Return float images [len(items), C, H, W] in about [0, 1], not clamped. rows: see `rows`; missing ones are
        filled up. Raises UserError for an image that is not finite."""
        noise = ImageNoise(self.seed, items, self.net.image_shape, self.device)
        fill = max((rows or len(items)) - len(items), 0)

        def filled(numbers: torch.Tensor) -> torch.Tensor:
            return torch.cat([numbers, numbers.new_zeros(fill, *numbers.shape[1:])]) if fill else numbers

        with autocast(self.device, self.precision):
            made = self.diffusion.sample(self.net, filled(noise.latents()), lambda step: filled(noise.step(step)),
                                         self.mode, self.steps, self.eta)[:len(items)]
        finite = torch.isfinite(made).flatten(1).all(1)
        if not finite.all():
            raise UserError(f"image {items[finite.long().argmin().item()]} is not finite; try --precision fp32, "
                            "another sampler or another checkpoint")
        return made
