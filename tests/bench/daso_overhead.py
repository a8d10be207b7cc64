"""What DASO's trainer costs besides the network, and what DASO adds to FixMatch.

    python -m tests.bench.daso_overhead [--batch_size 16] [--repeats 5]

Steps of WRN-28-2 on CIFAR-sized images with the published settings (FixMatch: two unlabelled images for a labelled
one). Bars: the trainer's own parts (batch, views, average of weights, statistics, log) take at most 10 % of a step on a
CPU and 15 % on a GPU; DASO's queue, similarity classifier and blending at most 5 % of a step of FixMatch. The teacher's
pass over the labelled images is not counted among these: it is arithmetic of the network. Exit status 1 above a bar.
"""
from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from DASO.lib.algorithm.daso import Blender, FeatureQueue
from DASO.lib.algorithm.interface import Draws
from DASO.lib.config.config import Config
from DASO.lib.data.augment import Look
from DASO.lib.data.sets import CIFAR10_STATISTICS, TrainingData
from DASO.lib.trainer import Trainer
from shared.cpu.allocator import keep_freed_memory
from shared.data.images import ImageSet
from shared.distributed import World
from shared.training.log import Log
from tests.bench.trainer_overhead import BARS, Stopwatch

DASO_BAR = 0.05
IMAGES, CLASSES = 4000, 10


def trainer_of(name: str, batch_size: int, device: torch.device, folder: Path) -> Trainer:
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (IMAGES, 3, 32, 32), np.uint8), np.arange(IMAGES) % CLASSES,
                      tuple(map(str, range(CLASSES))), "noise")
    data = TrainingData(images.subset(np.arange(1000)), images, None, None, Look(*CIFAR10_STATISTICS, 32), CLASSES)
    cfg = Config({"ALGORITHM.NAME": name, "SEED": 0, "SOLVER.IMS_PER_BATCH": batch_size,
                  "SOLVER.UNLABELED_BATCH_RATIO": 2, "DATASET.TRANSFORM.STRONG_AUG": True,
                  "ALGORITHM.DASO.PRETRAIN_STEPS": 0, "ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD": 1})
    return Trainer(cfg, data, World(device=device), folder)


def measure(name: str, batch_size: int, repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Return medians over `repeats` steps: seconds of a step, of the trainer's own parts, and of DASO's own parts."""
    own, head = Stopwatch(device), Stopwatch(device)
    plain = FeatureQueue.push, FeatureQueue.similarity, Blender.__call__, Blender.count
    FeatureQueue.push, FeatureQueue.similarity = head.wrap(FeatureQueue.push), head.wrap(FeatureQueue.similarity)
    Blender.__call__, Blender.count = head.wrap(Blender.__call__), head.wrap(Blender.count)
    rows = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(name, batch_size, device, Path(folder))
            if trainer.ema is not None:
                trainer.ema.update = own.wrap(trainer.ema.update)
            log = Log(folder, trainer.world, every=None, tensorboard=False)
            make, count, add = own.wrap(trainer.batches), own.wrap(trainer.count), own.wrap(log.add)
            for it in range(repeats + 1):
                own.seconds = head.seconds = 0.0
                started = own.now()
                batch = make(it)
                found, values = trainer.step(batch, it, Draws(0, it))
                count(batch, found)
                add(**values)
                rows.append((own.now() - started, own.seconds, head.seconds))
    finally:
        FeatureQueue.push, FeatureQueue.similarity, Blender.__call__, Blender.count = plain
    return tuple(np.median(rows[1:], axis=0))  # the first step is a warm-up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch_size", type=int, default=16, help="labelled images in a batch [16]")
    parser.add_argument("--repeats", type=int, default=5, help="steps measured [5]")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    bar, failed, plain = BARS[device.type], False, 0.0
    for name in ("Supervised", "FixMatch", "DASO"):
        step, own, head = measure(name, options.batch_size, options.repeats, device)
        plain = step if name == "FixMatch" else plain
        print(f"{name}: the trainer's own parts are {100 * own / step:.1f} % of a step of {step:.3f} s "
              f"(bar {100 * bar:g} %)", flush=True)
        failed |= own / step > bar
    print(f"DASO's queue, similarity and blending: {1000 * head:.1f} ms, {100 * head / plain:.1f} % of a step of "
          f"FixMatch (bar {100 * DASO_BAR:g} %)")
    return int(failed or head / plain > DASO_BAR)


if __name__ == "__main__":
    raise SystemExit(main())
