"""Sampling with the 56M ddpmpp of CIFAR-10, 64 images: what generate.py does against the plain eager way, in fp32.

    python -m tests.bench.sampling_step [--images 64] [--channels 128] [--compile]

Times one denoiser call with everything around it (a step of the sampler is two of them): draws, preconditioning, the
update in float64, the conversion to bytes. The plain way comes first: what the others tell the allocator cannot be
taken back. The best time of each counts. Exit status 1 where a bar is missed or the fp32 numbers differ.
"""
from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable

import torch

from EDM.sampling.seeds import SeedSampler
from EDM.training.networks import EDMPrecond
from shared.training.precision import computes_bf16
from tests.bench import eager_unet

BARS = {"cpu": {"fp32": 1.1, "bf16": 2.2}, "cuda": {"bf16": 4.0}}
SIGMA = 80.0


def make_network(channels: int, device: str) -> EDMPrecond:
    """Return the network with weights of a size that a trained one has."""
    torch.manual_seed(0)
    net = EDMPrecond(img_resolution=32, img_channels=3, label_dim=10, model_type="SongUNet", model_channels=channels,
                     channel_mult=[2, 2, 2])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.eval().requires_grad_(False).to(device)


def plain_way(net: EDMPrecond, count: int) -> Callable[[], torch.Tensor]:
    """Return a function that makes the images of seeds 0..count-1 in one step, as the published code does."""
    device = next(net.parameters()).device

    @torch.no_grad()
    def sample() -> torch.Tensor:
        generators = [torch.Generator(device).manual_seed(seed) for seed in range(count)]
        latents = torch.stack([torch.randn([3, 32, 32], generator=g, device=device) for g in generators])
        classes = torch.stack([torch.randint(10, [], generator=g, device=device) for g in generators])
        x = latents.double() * SIGMA
        x_hat = x + 0 * torch.stack([torch.randn([3, 32, 32], generator=g, device=device, dtype=torch.float64)
                                     for g in generators])
        sigma = torch.as_tensor(SIGMA, dtype=torch.float32, device=device).reshape(-1, 1, 1, 1)
        c_skip = net.sigma_data**2 / (sigma**2 + net.sigma_data**2)
        c_out = sigma * net.sigma_data / (sigma**2 + net.sigma_data**2).sqrt()
        c_in = 1 / (net.sigma_data**2 + sigma**2).sqrt()
        inner = eager_unet.forward(net.model, c_in * x_hat.float(), sigma.flatten().log() / 4,
                                   torch.eye(10, device=device)[classes])
        denoised = (c_skip * x_hat.float() + c_out * inner).double()
        x = x_hat + (0 - SIGMA) * (x_hat - denoised) / SIGMA
        return (x * 127.5 + 128).clip(0, 255).to(torch.uint8).cpu()
    return sample


def our_way(net: EDMPrecond, count: int, precision: str, compile: bool) -> Callable[[], torch.Tensor]:
    sampler = SeedSampler(copy.deepcopy(net), precision=precision, compile=compile, num_steps=1, sigma_max=SIGMA)
    return lambda: sampler.images(range(count)).cpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--channels", type=int, default=128, help="model_channels; less for a quick look")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = make_network(args.channels, device)
    images, best, held = {}, {}, True
    with_bf16 = ["bf16"] if computes_bf16(torch.device(device)) else []  # would take minutes where it is emulated
    for name in ("plain", "fp32", *with_bf16):
        way = plain_way(net, args.images) if name == "plain" else our_way(net, args.images, name, args.compile)
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
        print(f"{name:>5}: {seconds:.3f} s for a call with {args.images} images on {device}, {ratio:.2f} times as fast "
              f"as plain" + (f" (bar {bar:g})" if bar else ""))
    difference = {name: (images[name] - images["plain"]).abs() for name in ("fp32", *with_bf16)}
    bf16 = f", bf16 {difference['bf16'].mean():.2f} in the mean" if with_bf16 else ""
    print(f"grey levels apart: fp32 {difference['fp32'].max():.0f} at most{bf16}; "
          f"spread of the images {images['plain'].std():.0f}")
    return 0 if held and difference["fp32"].max() <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
