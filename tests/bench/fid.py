"""What fid.py costs beside its detector: reading images, memory, covariance and the distance, in one process.

    python -m tests.bench.fid [--images 20000] [--width 2048]

Slow paths: covariance sums batch by batch into a new matrix, and SciPy's matrix square root of the product of the
covariances (which current SciPy has deprecated in this form). Exit status 1 where an image was read more than once,
memory grew with their number, or the distance is not faster.
"""
from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from EDM.metrics import sources
from EDM.metrics.detectors import Detector
from EDM.metrics.features import extract
from EDM.metrics.metrics import Moments, frechet_distance
from shared.distributed import World

SIDE = 32
BATCH = 64
MAX_GROWTH_MIB = 64


def stand_in(width: int) -> Detector:
    """Return a detector that costs next to nothing: `width` of the pixels."""
    return Detector("stand-in", "stand-in", lambda images: (images.flatten(1)[:, :width].float() / 255, None), 3, width,
                    0, "none", "none", "none", torch.device("cpu"))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_reading(count: int, width: int) -> bool:
    """Stream `count` PNGs; return whether each was read once and memory did not grow with their number."""
    read, original = Counter(), sources.read_members

    def counted(path, members):
        read.update(member.name for member in members)
        return original(path, members)

    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        for index in range(count):
            pixels = np.cumsum(random.integers(-9, 10, (SIDE, SIDE, 3)), axis=1).astype(np.uint8)
            Image.fromarray(pixels).save(Path(folder) / f"{index:06d}.png")
        extract(sources.FileImages(folder, count=count // 10), stand_in(width), BATCH, World())
        before = peak_mib()
        sources.read_members = counted
        start = time.perf_counter()
        extraction = extract(sources.FileImages(folder), stand_in(width), BATCH, World())
        seconds = time.perf_counter() - start
        sources.read_members = original
    growth, most = peak_mib() - before, max(read.values())
    print(f"reading {count} images of {SIDE}x{SIDE}: {count / seconds:.0f} images/s with {width} features, each "
          f"file read {most} time(s); peak memory {growth:.0f} MiB above that of a tenth of them "
          f"(their pixels: {count * SIDE**2 * 3 / 2**20:.0f} MiB, their features: {count * width * 4 / 2**20:.0f} MiB)")
    return len(read) == extraction.moments.count == count and most == 1 and growth < MAX_GROWTH_MIB


def features(count: int, width: int, seed: int) -> torch.Tensor:
    """Return correlated features [count, width] that are never negative."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return (torch.randn(count, width, generator=generator) @ mix * (1 + 0.1 * seed)).relu()


def seconds_of(work: Callable[[], object], repeats: int = 1) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def bench_covariance(width: int) -> None:
    batches = features(20 * BATCH, width, 0).split(BATCH)

    def plain() -> None:
        mu, sigma = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        for batch in batches:
            batch = batch.double()
            mu += batch.sum(0)
            sigma += batch.T @ batch

    def ours() -> None:
        moments = Moments(width)
        for batch in batches:
            moments.add(batch)

    ours()
    slow, fast = seconds_of(plain, 3), seconds_of(ours, 3)
    print(f"covariance of {width} features: plain {slow / 20 * 1e3:.1f} ms a batch of {BATCH}, "
          f"ours {fast / 20 * 1e3:.1f} ms: {slow / fast:.2f} times")


def bench_distance(width: int, count: int, what: str) -> bool:
    """Compare the two ways on statistics of `count` images; return whether ours is faster and agrees."""
    from scipy.linalg import sqrtm

    statistics = []
    for seed in (0, 1):
        moments = Moments(width)
        moments.add(features(count, width, seed))
        statistics += moments.mean_and_covariance()
    mu1, sigma1, mu2, sigma2 = (tensor.numpy() for tensor in statistics)
    root = []

    def plain() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root[:] = [np.trace(np.real(sqrtm(sigma1 @ sigma2)))]

    slow = seconds_of(plain)
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2) - 2 * root[0]
    distance: list[float] = []
    fast = seconds_of(lambda: distance.append(frechet_distance(*statistics)), 2)
    print(f"distance, {what} ({count} images, {width} features): sqrtm {slow:.1f} s ({expected:.6g}), "
          f"eigenvalues {fast:.1f} s ({distance[0]:.6g}): {slow / fast:.2f} times")
    return fast < slow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    held = [bench_reading(args.images, args.width)]
    bench_covariance(args.width)
    held += [bench_distance(args.width, 2 * args.width, "full rank"),
             bench_distance(args.width, args.width // 2, "singular")]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
