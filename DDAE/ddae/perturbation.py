"""What a noise-conditional classifier sees of an image: the image with noise, and the level of the noise as a number.

Variance preserving (DDPM): sqrt(abar_t) x + sqrt(1 - abar_t) noise, told t / n_T. Variance exploding (EDM): x + sigma
noise, told ln sigma. Images come in [0, 1] and are scaled to [-1, 1].
"""
from __future__ import annotations

from torch import Tensor

from DDAE.ddae.diffusion import DDPM, EDM


def training_view(diffusion: DDPM | EDM, x01: Tensor, drawn: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (noisy images [N, C, H, W], time input [N]) at the levels that `diffusion.draw` gave [N]."""
    x = 2 * x01 - 1
    if diffusion.kind == "DDPM":
        return diffusion.perturb(x, drawn, noise)
    sigma = diffusion.training_sigma(drawn)
    return x + sigma.view(-1, 1, 1, 1) * noise, sigma.log()


def test_view(diffusion: DDPM | EDM, x01: Tensor, level: int, noise: Tensor, **steps: int) -> tuple[Tensor, Tensor]:
    """Return (noisy images, time input [N]) with all images at one of `diffusion.test_levels()`.

    steps: of EDM's schedule, in which its levels are counted (default 18).
    """
    noisy, time = diffusion.perturb(2 * x01 - 1, level, noise, **steps)
    time = time.flatten() if diffusion.kind == "DDPM" else time.flatten().log()
    return noisy, time.expand(len(x01))


test_view.__test__ = False  # no test
