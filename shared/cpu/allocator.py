"""The C library's memory allocator, set up for training on a CPU."""
from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
NEVER, PAD = 2**31 - 1, 64 << 20


def keep_freed_memory() -> bool:
    """Keep freed memory in the process for the next tensors; return whether the C library (glibc) can do that.

    By default every large tensor is mapped anew and the system clears its pages: a quarter of a step's time in a
    convolutional network on a CPU. In exchange the process keeps the most memory it ever had, and up to half more for
    gaps. Numbers do not change. Call it before the first large tensor.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, NEVER), mallopt(TOP_PAD, PAD)])
