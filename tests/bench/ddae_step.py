"""A training step of DDAE's two networks on CIFAR-10's shape against the published way, in units of unit.py.

    python -m tests.bench.ddae_step [--config DDPM_ddpm EDM_ddpmpp] [--ways original fp32 bf16]

The published way is eager NCHW, Adam and the average one tensor at a time; on a GPU it is fp16 autocast with a barrier
and a loss brought to the host in each step. Loss and gradients of the first step are compared. Exit status 1 where a
bar is missed or they differ.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from DDAE.ddae.config import Config, make_diffusion, make_network, read_config
from DDAE.ddae.data import Batch
from DDAE.ddae.model import UNet
from DDAE.ddae.training import draw, train
from shared.distributed import World
from shared.training.checkpoint import read_checkpoint
from shared.training.ema import EMA
from tests.bench import eager_ddae
from tests.bench.unit import unit

CONFIGS = Path(__file__).parents[2] / "DDAE" / "config"
# Images, and the most units a step may take, per precision.
BARS = {"DDPM_ddpm": (32, {"fp32": 95, "bf16": 46}), "EDM_ddpmpp": (16, {"fp32": 142, "bf16": 63})}
GPU_RATIO = 4.0
DECAY = 0.999


class Stopwatch:
    """The same batch in every step, and the seconds between its requests: those of `inner` steps each."""

    per_epoch = 10**9

    def __init__(self, config: Config, images: int, device: torch.device, warm: int = 1, inner: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand([images, *config.network["image_shape"]], generator=generator).to(device)
        self.batch = Batch(pixels, torch.zeros(images, dtype=torch.int64, device=device), np.arange(images),
                           slice(0, images), images)
        self.warm, self.inner, self.times, self.units = warm, inner, [], []

    def __call__(self, step: int) -> Batch:
        if step >= self.warm and (step - self.warm) % self.inner == 0:
            if self.batch.images.is_cuda:
                torch.cuda.synchronize()
            if step > self.warm:
                self.times.append((time.perf_counter() - self.start) / self.inner)
            if not self.batch.images.is_cuda:
                self.units.append(unit())
            self.start = time.perf_counter()
        return self.batch


def run(net: UNet, config: Config, way: str, batches: Stopwatch, steps: int, compiled: bool) -> tuple[float, Any]:
    """Train for some steps; return the first loss and the optimizer's state."""
    device = batches.batch.images.device
    if way == "original":
        return original(net.to(device), config, batches, steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config.save_dir = folder
        train(config, net, batches, World(device=device), gpus=1, precision=way, seed=0, steps=steps, compile=compiled,
              constant_ema=True, log_every=1 if steps == 1 else 50)
        stats = (Path(folder) / "stats.jsonl").read_text().splitlines()
        return json.loads(stats[0])["loss"], read_checkpoint(Path(folder) / "checkpoint.pt")["optimizer"]


def original(net: UNet, config: Config, batches: Stopwatch, steps: int) -> tuple[float, Any]:
    """The published step."""
    device, diffusion = batches.batch.images.device, make_diffusion(config)
    net.forward = lambda *inputs: eager_ddae.forward(net, *inputs)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lrate, foreach=False)
    half, ema, losses = device.type == "cuda", EMA(net, buffers="keep"), []
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    for step in range(steps):
        batch = batches(step)
        draws = draw(diffusion, batch, 0, step)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16, enabled=half):
            loss = diffusion.loss(net, 2 * batch.images - 1, draws.level, draws.noise)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for average, parameter in zip(ema.module.parameters(), net.parameters(), strict=True):
                average.lerp_(parameter, 1 - DECAY)
        if half:
            torch.cuda.synchronize()
        losses.append(loss.item())
    return losses[0], optimizer.state_dict()


def first_update(net: UNet, config: Config, way: str, device: torch.device) -> tuple[float, torch.Tensor]:
    """Return loss and all gradients of a step without dropout, as Adam's first moments tell them."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    loss, state = run(net, config, way, Stopwatch(config, 2, device), 1, compiled=False)
    return loss, torch.cat([entry["exp_avg"].cpu().flatten() for entry in state["state"].values()])


def measure(name: str, args: argparse.Namespace, device: torch.device) -> bool:
    images, bars = BARS[name]
    images = args.images or images
    config = read_config(CONFIGS / f"{name}.yaml", [f"network.n_channels={args.channels}", "save_model=false",
                                                    f"batch_size={images}"])
    torch.manual_seed(0)
    net = make_network(config)
    reference_loss, reference = first_update(net, config, "original", device)
    held = True
    for way in (way for way in args.ways if way != "original"):
        loss, gradients = first_update(net, config, way, device)
        apart = ((gradients - reference).norm() / reference.norm()).item()
        held &= way != "fp32" or device.type != "cpu" or apart < 1e-4
        print(f"{name} {way:>8}: first loss {loss:.6f} (original {reference_loss:.6f}), gradients {apart:.1e} apart",
              flush=True)

    results: dict[str, float] = {}
    warm, inner = (1, 1) if device.type == "cpu" else (5, 20)
    for way in args.ways:  # the original first: what the allocator is told cannot be taken back
        watch = Stopwatch(config, images, device, warm, inner)
        run(copy.deepcopy(net), config, way, watch, warm + args.repeats * inner + 1, args.compile)
        results[way] = min(watch.times)
        ratio = f", {results['original'] / results[way]:.2f} x as fast as the original" if "original" in results else ""
        if device.type == "cpu":
            # The best of each: what other processes take away belongs to neither.
            value, bar = results[way] / min(watch.units), bars.get(way)
            held &= bar is None or value <= bar
            print(f"{name} {way:>8}: {value:6.1f} units of {min(watch.units):.4f} s on {torch.get_num_threads()} "
                  "threads" + (f" (bar {bar})" if bar else "") + ratio, flush=True)
        else:
            print(f"{name} {way:>8}: {1000 * results[way]:.2f} ms, {images / results[way]:.0f} images a second{ratio}",
                  flush=True)
            held &= way != "bf16" or "original" not in results or results["original"] / results[way] >= GPU_RATIO
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", default=list(BARS), choices=list(BARS))
    parser.add_argument("--images", type=int, help="per step; the bars are for 32 and 16")
    parser.add_argument("--channels", type=int, default=128, help="n_channels; less for a quick look")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--ways", nargs="+", default=["original", "fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    held = [measure(name, args, device) for name in args.config]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
