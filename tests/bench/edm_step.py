"""One EDM training step of a CIFAR-10 network of full size on 16 images: the trainer's against the original way.

    python -m tests.bench.edm_step [--arch ddpmpp] [--images 16] [--channels N] [--ways original fp32 bf16]

Conditional, with augmentation and dropout: forward, backward, Adam, average of the weights. Times are in units of
tests/bench/unit.py, measured in this process. The original way is eager fp32 in NCHW, attention by einsum, and one
Python loop over the parameters each for replacing non-finite gradients, for Adam and for the average. Bars are units
for ddpmpp; other networks have other arithmetic, and theirs are what those units are as shares of ddpmpp's original
way. Exit status 1 where a bar is missed or the numbers of the first step, taken without dropout, differ.
"""
from __future__ import annotations

import argparse
import copy
import sys
import time

import numpy as np
import torch

from EDM.train import ARCHITECTURES, AUGMENT_DIM
from EDM.training.augment import AugmentPipe
from EDM.training.dataset import Batch
from EDM.training.loss import EDMLoss
from EDM.training.networks import EDMPrecond, use_channels_last
from EDM.training.training_loop import draw, forward_backward, update
from shared.cpu.allocator import keep_freed_memory
from shared.training.ema import EMA
from shared.training.randomness import Dropout
from tests.bench import eager_unet
from tests.bench.unit import unit

ORIGINAL = 153.0
BARS = {"fp32": 145.0, "bf16": 66.0}
LR, BETA = 1e-3, 0.999
AUGMENT = dict(p=0.12, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def make_network(arch: str, channels: int | None) -> EDMPrecond:
    """Return the published network for images of 32 x 32, with weights of a size that a trained one has."""
    torch.manual_seed(0)
    settings = dict(ARCHITECTURES[arch]) if channels is None else dict(ARCHITECTURES[arch], model_channels=channels)
    net = EDMPrecond(img_resolution=32, img_channels=3, label_dim=10, augment_dim=AUGMENT_DIM, dropout=0.13, **settings)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def set_dropout(net: torch.nn.Module, p: float) -> None:
    for module in net.modules():
        if isinstance(module, Dropout) and module.rescale:
            module.p = p


class Way:
    """A network, its optimizer and average, and `step(number)`, which returns the mean loss."""

    def __init__(self, net: EDMPrecond, images: int, precision: str | None, device: str = "cpu") -> None:
        net = net.to(device)
        self.net, self.precision, self.loss_fn, self.augment = net, precision, EDMLoss(), AugmentPipe(**AUGMENT)
        generator = torch.Generator().manual_seed(0)
        pictures = 2 * torch.rand([images, 3, 32, 32], generator=generator) - 1
        labels = torch.eye(10)[torch.randint(10, [images], generator=generator)]
        self.batch = Batch(pictures.to(device), labels.to(device), np.arange(images))
        if precision is None:
            net.model.forward = lambda *inputs: eager_unet.forward(net.model, *inputs)
            self.optimizer = torch.optim.Adam(net.parameters(), lr=LR, foreach=False)
        else:
            use_channels_last(net)
            self.optimizer = torch.optim.Adam(net.parameters(), lr=LR, fused=True)
        self.ema = EMA(net, buffers="keep")

    def step(self, number: int) -> torch.Tensor:
        """Take a step with the draws of `number`; return the mean loss."""
        draws = draw(self.loss_fn, self.augment, 0, number, len(self.batch.images), self.batch)
        if self.precision is None:
            return self._original_step(draws)
        sums, _ = forward_backward(self.net, self.loss_fn, self.augment, self.batch, draws, precision=self.precision)
        update(self.net, self.optimizer, LR)
        self.ema.update(self.net, BETA)
        return sums[0] / self.batch.images.numel()

    def _original_step(self, draws) -> torch.Tensor:
        images, augment_labels = self.augment.apply(self.batch.images, draws.augment)
        loss = self.loss_fn(self.net, images, self.batch.labels, augment_labels, draws.level, draws.noise)
        loss.sum().mul(1 / len(images)).backward()
        for parameter in self.net.parameters():
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.module.parameters(), self.net.parameters(), strict=True):
                average.copy_(parameter.lerp(average, BETA))
        self.optimizer.zero_grad(set_to_none=True)
        return loss.mean()


def first_update(net: EDMPrecond, images: int, precision: str | None) -> tuple[float, torch.Tensor]:
    """Return loss and all gradients of a step without dropout, as Adam's first moments tell them."""
    way = Way(copy.deepcopy(net), images, precision)
    set_dropout(way.net, 0)
    loss = way.step(0).item()
    return loss, torch.cat([way.optimizer.state[parameter]["exp_avg"].flatten() for parameter in way.net.parameters()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="ddpmpp", choices=["ddpmpp", "ncsnpp", "adm"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--channels", type=int, help="model_channels; less for a quick look")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--ways", nargs="+", default=["original", "fp32", "bf16"])
    args = parser.parse_args()
    net = make_network(args.arch, args.channels)
    reference_loss, reference = first_update(net, 2, None)
    apart, held = {}, True
    for name in BARS:
        loss, gradients = first_update(net, 2, name)
        apart[name] = ((gradients - reference).norm() / reference.norm()).item()
        print(f"{args.arch} {name:>8}: first loss {loss:.6f} (original {reference_loss:.6f}), gradients "
              f"{apart[name]:.1e} apart", flush=True)

    in_units: dict[str, float] = {}
    for name in args.ways:  # the original first: what the allocator is told cannot be taken back
        if name != "original":
            keep_freed_memory()
        way = Way(copy.deepcopy(net), args.images, None if name == "original" else name)
        way.step(0)  # warms up
        times, units = [], [unit()]
        for number in range(1, args.repeats + 1):
            start = time.perf_counter()
            way.step(number).item()
            times.append(time.perf_counter() - start)
            units.append(unit())
        del way  # three of the largest network would be too many
        # The best of each: what other processes take away belongs to neither.
        in_units[name] = min(times) / min(units)
        line, bar = f"{args.arch} {name:>8}: {in_units[name]:6.1f} units of {min(units):.4f} s", BARS.get(name)
        if args.arch != "ddpmpp" and bar is not None:
            bar *= in_units.get("original", float("inf")) / ORIGINAL
        if "original" in in_units and name != "original":
            line += f", {in_units['original'] / in_units[name]:.2f} x as fast as the original"
        if bar is not None:
            line += f" (bar {bar:.1f})"
            held &= in_units[name] <= bar
        print(line, flush=True)
    print(f"{torch.get_num_threads()} threads")
    return 0 if held and apart["fp32"] < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
