"""The unit in which training steps are compared between machines.

One unit is the time of one forward and backward pass of a 3x3 convolution, 64 to 64 channels, on a float32 batch
[64, 64, 32, 32]: 14.5 GFLOP. It is measured in the same process as the step, before and after it.
"""
from __future__ import annotations

import time

import torch
from torch.nn import functional as F


def unit(repeats: int = 11) -> float:
    """Return the median time of one unit in seconds."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, 3, 3, generator=generator, requires_grad=True)
    images = torch.randn(64, 64, 32, 32, generator=generator, requires_grad=True)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        F.conv2d(images, weight, padding=1).sum().backward()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


if __name__ == "__main__":
    print(f"one unit: {unit():.4f} s on {torch.get_num_threads()} threads")
