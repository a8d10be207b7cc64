"""A training step of DDAE's two networks on CIFAR-10's shape against the published way, in units of unit.py.

    python -m tests.bench.ddae_step [--config DDPM_ddpm EDM_ddpmpp] [--ways original fp32 bf16]

The published way is eager NCHW, Adam and the average one tensor at a time; on a GPU it is fp16 autocast with a barrier
and a loss brought to the host in each step. Loss and gradients of the first step are compared. Exit status 1 where a
bar is missed or they differ.
"""
from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch

from DDAE.ddae.batches import Batch
from DDAE.ddae.config import Config, make_diffusion, make_network, read_config
from DDAE.ddae.model import UNet, use_channels_last
from DDAE.ddae.training import draw, make_optimizer, training_step
from shared.cpu.allocator import keep_freed_memory
from shared.training.ema import EMA
from tests.bench import eager_ddae
from tests.bench.unit import unit

CONFIGS = Path(__file__).parents[2] / "DDAE" / "config"
# Images, and the most units a step may take, per precision.
BARS = {"DDPM_ddpm": (32, {"fp32": 95, "bf16": 46}), "EDM_ddpmpp": (16, {"fp32": 142, "bf16": 63})}
GPU_RATIO = 4.0
LR, DECAY = 1e-4, 0.999


class Way:
    """A network, its optimizer and average, and `step(number)`, which returns the loss."""

    def __init__(self, net: UNet, config: Config, images: int, way: str, device: torch.device, compiled: bool) -> None:
        self.net, self.config, self.way, self.device = net.to(device), config, way, device
        self.diffusion = make_diffusion(config)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand([images, *config.network["image_shape"]], generator=generator).to(device)
        self.batch = Batch(pixels, torch.zeros(images, dtype=torch.int64, device=device), np.arange(images),
                           slice(0, images), images)
        self.scaler = None
        if way == "original":
            net.forward = lambda *inputs: eager_ddae.forward(net, *inputs)
            self.optimizer = torch.optim.Adam(net.parameters(), lr=LR, foreach=False)
            self.scaler = torch.amp.GradScaler(device.type) if device.type == "cuda" else None
        else:
            use_channels_last(net)
            self.optimizer = make_optimizer(config, net, strict=False)
        self.ema = EMA(net, buffers="keep")
        if compiled and way != "original":
            net.compile()

    def step(self, number: int) -> float:
        draws = draw(self.diffusion, self.batch, 0, number)
        if self.way == "original":
            return self._original_step(draws)
        loss, _ = training_step(self.net, self.diffusion, self.optimizer, self.ema, self.batch, draws, seed=0,
                                step=number, lr=LR, decay=DECAY, at_once=len(self.batch.images), precision=self.way)
        return loss

    def _original_step(self, draws) -> float:
        images, half = 2 * self.batch.images - 1, self.scaler is not None
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.float16, enabled=half):
            loss = self.diffusion.loss(self.net, images, draws.level, draws.noise)
        (self.scaler.scale(loss) if half else loss).backward()
        if half:
            self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, foreach=False)
        if half:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.module.parameters(), self.net.parameters(), strict=True):
                average.lerp_(parameter, 1 - DECAY)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()


def first_update(net: UNet, config: Config, way: str, device: torch.device) -> tuple[float, torch.Tensor]:
    """Return loss and all gradients of a step without dropout, as Adam's first moments tell them."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    way = Way(net, config, 2, way, device, compiled=False)
    loss = float(way.step(0))
    return loss, torch.cat([way.optimizer.state[p]["exp_avg"].flatten() for p in way.net.parameters()])


def measure(name: str, args: argparse.Namespace, device: torch.device) -> bool:
    config = read_config(CONFIGS / f"{name}.yaml", [f"network.n_channels={args.channels}"])
    torch.manual_seed(0)
    net = make_network(config)
    images, bars = BARS[name]
    images = args.images or images
    reference_loss, reference = first_update(net, config, "original", device)
    held = True
    for way in (way for way in args.ways if way != "original"):
        loss, gradients = first_update(net, config, way, device)
        apart = ((gradients - reference).norm() / reference.norm()).item()
        held &= way != "fp32" or device.type != "cpu" or apart < 1e-4
        print(f"{name} {way:>8}: first loss {loss:.6f} (original {reference_loss:.6f}), gradients {apart:.1e} apart",
              flush=True)

    results: dict[str, float] = {}
    for way in args.ways:  # the original first: what the allocator is told cannot be taken back
        if way != "original" and device.type == "cpu":
            keep_freed_memory()
        runner = Way(copy.deepcopy(net), config, images, way, device, args.compile)
        for number in range(1 if device.type == "cpu" else 5):
            runner.step(number)  # warms up
        times, units = [], [unit()]
        for number in range(args.repeats):
            start = time.perf_counter()
            for inner in range(1 if device.type == "cpu" else 20):
                runner.step(number * 20 + inner)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / (1 if device.type == "cpu" else 20))
            units.append(unit() if device.type == "cpu" else units[0])
        results[way] = min(times)
        ratio = f", {results['original'] / results[way]:.2f} x as fast as the original" if "original" in results else ""
        if device.type == "cpu":
            # The best of each: what other processes take away belongs to neither.
            value, bar = results[way] / min(units), bars.get(way)
            held &= bar is None or value <= bar
            print(f"{name} {way:>8}: {value:6.1f} units of {min(units):.4f} s on {torch.get_num_threads()} threads"
                  + (f" (bar {bar})" if bar else "") + ratio, flush=True)
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
