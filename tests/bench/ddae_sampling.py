"""Sampling with the 56.5M DDPM++ of DDAE by EDM's steps: what sample.py does against the plain eager way, in fp32.

    python -m tests.bench.ddae_sampling [--images 32] [--steps 2] [--channels 128] [--compile]

Timed are 2·steps - 1 network calls with everything around them: draws, preconditioning, clipping, the update in
float64, the conversion to bytes. 18 steps take 35/3 of 2. The plain way comes first: what the others tell the allocator
cannot be taken back. The best time of each counts. Exit status 1 where a bar is missed or the fp32 images differ.
"""
from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from DDAE.ddae.config import make_diffusion, make_network, read_config
from DDAE.ddae.model import UNet
from DDAE.ddae.sampling import ImageNoise, ImageSampler, to_uint8
from shared.training.precision import computes_bf16
from tests.bench import eager_ddae

CONFIG = Path(__file__).parents[2] / "DDAE" / "config" / "EDM_ddpmpp.yaml"
BARS = {"cpu": {"fp32": 1.1, "bf16": 2.2}, "cuda": {"bf16": 4.0}}


def plain_way(net: UNet, diffusion, count: int, steps: int) -> Callable[[], torch.Tensor]:
    """Return a function that makes `count` images as the published code does, which draws noise in every step."""
    device = next(net.parameters()).device

    def call(x: torch.Tensor, t: torch.Tensor, aug: torch.Tensor | None = None) -> torch.Tensor:
        return eager_ddae.forward(net, x, t, aug)

    @torch.no_grad()
    def sample() -> torch.Tensor:
        latents = ImageNoise(0, range(count), net.image_shape, device).latents()
        for _ in range(steps):
            torch.randn(latents.shape, device=device, dtype=torch.float64)
        return to_uint8(diffusion.sample(call, latents, None, steps=steps)).cpu()
    return sample


def our_way(net: UNet, diffusion, count: int, steps: int, precision: str, compile: bool) -> Callable[[], torch.Tensor]:
    sampler = ImageSampler(copy.deepcopy(net), diffusion, steps=steps, precision=precision, compile=compile)
    return lambda: to_uint8(sampler.images(range(count))).cpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--channels", type=int, default=128, help="n_channels; less for a quick look")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = read_config(CONFIG, [f"network.n_channels={args.channels}"])
    torch.manual_seed(0)
    net, diffusion = make_network(config).eval().requires_grad_(False).to(device), make_diffusion(config)
    torch.backends.cudnn.benchmark = True
    images, best, held = {}, {}, True
    with_bf16 = ["bf16"] if computes_bf16(torch.device(device)) else []  # would take minutes where it is emulated
    for name in ("plain", "fp32", *with_bf16):
        way = (plain_way(net, diffusion, args.images, args.steps) if name == "plain"
               else our_way(net, diffusion, args.images, args.steps, name, args.compile))
        images[name] = way().float()  # warms up as well
        times = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
        best[name] = min(times)
    for name, seconds in best.items():
        ratio, bar = best["plain"] / seconds, BARS[device].get(name)
        held &= bar is None or ratio >= bar
        print(f"{name:>5}: {seconds:.3f} s for {args.images} images, {2 * args.steps - 1} calls, on {device}, "
              f"{ratio:.2f} times as fast as plain" + (f" (bar {bar:g})" if bar else ""))
    difference = {name: (images[name] - images["plain"]).abs() for name in ("fp32", *with_bf16)}
    bf16 = f", bf16 {difference['bf16'].mean():.2f} in the mean" if with_bf16 else ""
    print(f"grey levels apart: fp32 {difference['fp32'].max():.0f} at most{bf16}; "
          f"spread of the images {images['plain'].std():.0f}")
    return 0 if held and difference["fp32"].max() <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
