"""The number format a network computes in, and what that allows the kernels to do.

fp32 is the default on CPUs, bf16 on GPUs that have it in hardware (older ones emulate it, more slowly than fp32).
"""
from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from shared.lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def dtype_of(precision: str) -> torch.dtype | None:
    """Return what autocast computes in for "bf16" or "fp16"; None, no autocast, for "fp32"."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself. CPUs count as such: PyTorch has kernels for all of them."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def default_precision(device: torch.device, strict: bool = False) -> str:
    """Return what is computed in where nothing is asked for: "bf16" on a GPU that has it, else "fp32"."""
    return "bf16" if device.type == "cuda" and not strict and has_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a network computes in `precision` (fp32: none at all)."""
    dtype = dtype_of(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def set_arithmetic(strict: bool, tf32: bool = True, benchmark: bool = True, deterministic: bool = False) -> None:
    """Choose the kernels of this process: the fastest, found by trying (`benchmark`), or `deterministic` ones.

    tf32: whether convolutions of fp32 numbers may round them to 10 bits of mantissa, as PyTorch allows on GPUs.
    strict: deterministic and full fp32, whatever the others say.
    """
    torch.backends.cudnn.benchmark = benchmark and not strict
    torch.backends.cudnn.deterministic = deterministic or strict
    torch.backends.cudnn.allow_tf32 = tf32 and not strict
    torch.backends.cuda.matmul.allow_tf32 = False
    if strict:
        torch.use_deterministic_algorithms(True, warn_only=True)
