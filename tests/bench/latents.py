"""The latents of a training batch: from one memory-mapped array, and as published, a pickled pair a file.

    python tests/bench/latents.py [--images N] [--batch B] [--steps S] [--shape C,s,s]

On a GPU also the step of a small U-ViT in bf16, with attention in bf16 and, as published, in fp32. Ways take turns, and
the medians are printed; the files lie in the system's cache, so a disk's own time comes on top.
"""
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from EDM.latent.latents import read_latents
from EDM.latent.schedules import ContinuousSchedule
from EDM.latent.training import loss_of
from EDM.latent.uvit import UViT

NET = dict(embed_dim=256, depth=4, num_heads=4, num_classes=1001, use_checkpoint=True)


def write(folder: Path, images: int, shape: tuple[int, ...]) -> tuple[Path, Path]:
    """Write the same latents as an array and as pairs."""
    moments = np.random.default_rng(0).standard_normal((images, 2 * shape[0], *shape[1:]), np.float32)
    array, pairs = folder / "array", folder / "pairs"
    for place in (array, pairs):
        place.mkdir()
    np.save(array / "moments.npy", moments)
    np.save(array / "labels.npy", np.arange(images) % 1000)
    (array / "latents.json").write_text(json.dumps({"classes": [], "scale": 0.18215, "coder": ""}))
    for row, values in enumerate(moments):
        pair = np.empty(2, object)
        pair[:] = [values, row % 1000]
        np.save(pairs / f"{row}.npy", pair)
    return array, pairs


def pickled(folder: Path) -> Callable[[np.ndarray], object]:
    """The published way: unpickle each pair."""
    def take(rows: np.ndarray) -> object:
        found = [np.load(folder / f"{row}.npy", allow_pickle=True) for row in rows]
        return np.stack([moments for moments, _ in found]), [label for _, label in found]
    return take


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 4096), ("batch", 256), ("steps", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", default="4,32,32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    shape, device = tuple(map(int, options.shape.split(","))), torch.device(options.device)
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        array, pairs = write(Path(folder), options.images, shape)
        ways = {"one array": rows_of(array, shape), "a file each, unpickled": pickled(pairs),
                "a file each, nothing run": rows_of(pairs, shape)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.steps):
            rows = rng.integers(0, options.images, options.batch)
            for name, take in ways.items():
                times[name].append(seconds(lambda take=take, rows=rows: take(rows)))
    report(f"{options.batch} latents", times)

    if device.type == "cuda":
        report("a step of a small U-ViT, 32 latents, bf16", attention(shape, device, options.steps))


def attention(shape: tuple[int, ...], device: torch.device, steps: int) -> dict[str, list[float]]:
    net = UViT(img_size=shape[1], patch_size=2, in_chans=shape[0], **NET).to(device)
    x, noise = torch.randn(2, 32, *shape, device=device)
    labels, t = torch.arange(32, device=device), torch.rand(32, device=device)

    def step() -> None:
        loss_of(net, ContinuousSchedule(), x, labels, t, noise, "bf16").backward()
        torch.cuda.synchronize()

    times: dict[str, list[float]] = {"attention in bf16": [], "attention in fp32, as published": []}
    for _ in range(steps):
        for name, found in times.items():
            net.set_full_precision_attention("fp32" in name)
            found.append(seconds(step))
    return times


def rows_of(folder: Path, shape: tuple[int, ...]) -> Callable[[np.ndarray], object]:
    rows = read_latents(folder, shape).rows
    return rows.take


def report(what: str, times: dict[str, list[float]]) -> None:
    print(what)
    for name, found in times.items():
        print(f"  {1000 * statistics.median(found):8.2f} ms  {name}")


if __name__ == "__main__":
    main()
