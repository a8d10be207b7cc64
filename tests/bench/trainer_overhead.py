"""What the trainer costs besides the network, for every learner: batch, augmentation, average of weights, log.

    python -m tests.bench.trainer_overhead [--batch_size 16] [--only fixmatch,vat]

Steps of WRN-28-2 on CIFAR-sized images with the published settings; the trainer's own parts are timed by themselves
within each step. Smaller batches than the published 64 make its share larger. Exit status 1 where it is above the bar:
10 % of a step on a CPU, 15 % on a GPU.
"""
from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shared.data.images import ImageSet
from shared.distributed import World
from shared.training.log import Log
from tests.torchssl.tiny import learner_class
from TorchSSL.core.algorithm import Setting
from TorchSSL.core.data import NORMALISATION, Batches, TrainingData
from TorchSSL.core.networks import WideResNet
from TorchSSL.core.trainer import Trainer
from TorchSSL.make_configs import LEARNERS

BARS = {"cpu": 0.10, "cuda": 0.15}
IMAGES, CLASSES = 2000, 10


class Stopwatch:
    """Adds up the seconds spent in the functions it wraps, waiting for the GPU before and after each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - started
        return timed


def share_of(name: str, batch_size: int, repeats: int, device: torch.device) -> tuple[float, float]:
    """Return (the trainer's share of a step, seconds of a step), medians over `repeats` steps."""
    script = importlib.import_module(f"TorchSSL.{name}")
    options = script.parse([f"--batch_size={batch_size}", "--compile=False"])
    rng, world = np.random.default_rng(0), World(device=device)
    images = ImageSet(rng.integers(0, 256, (IMAGES, 3, 32, 32), np.uint8), np.arange(IMAGES) % CLASSES,
                      tuple(map(str, range(CLASSES))), "noise")
    data = TrainingData(images.subset(np.arange(40)), images, images, np.arange(40), CLASSES, *NORMALISATION["cifar10"])
    learner = learner_class(script)(options, Setting(CLASSES, IMAGES, (1 / CLASSES,) * CLASSES, world))
    net = WideResNet(CLASSES, rotation_head=learner.rotation_head).to(device, memory_format=torch.channels_last)
    trainer = Trainer(net, learner, options, world, "bf16" if device.type == "cuda" else "fp32")
    batches = Batches(data, options, world, learner.views, batch_size, learner.labeled_views)
    watch = Stopwatch(device)
    trainer.ema.update = watch.wrap(trainer.ema.update)
    shares, totals = [], []
    with tempfile.TemporaryDirectory() as folder:
        log = Log(folder, world, every=None, tensorboard=False)
        make, add = watch.wrap(batches), watch.wrap(log.add)
        for step in range(repeats + 1):
            watch.seconds, started = 0.0, watch.now()
            trainer.iteration = step
            add(**trainer.train_step(make(step)))
            totals.append(watch.now() - started)
            shares.append(watch.seconds / totals[-1])
    return float(np.median(shares[1:])), float(np.median(totals[1:]))  # the first step is a warm-up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch_size", type=int, default=16, help="labelled images in a batch [16]")
    parser.add_argument("--only", default=",".join(LEARNERS), help="learners, separated by commas [all]")
    parser.add_argument("--repeats", type=int, default=3, help="steps measured [3]")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = False
    for name in options.only.split(","):
        share, seconds = share_of(name, options.batch_size, options.repeats, device)
        bar = BARS[device.type]
        print(f"{name}: {100 * share:.1f} % of a step of {seconds:.2f} s (bar {100 * bar:g} %)", flush=True)
        failed |= share > bar
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
