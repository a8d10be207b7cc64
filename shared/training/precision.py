"""Device, precision and kernels: transfers to the device, autocast, determinism, hardware names.

fp32 is the default on CPUs, bf16 on GPUs that have it in hardware (older ones emulate it, more slowly than fp32).
"""
from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._triton import has_triton

CASTING_DEVICES = ("cuda",)  # see `cast_weights`


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return an array or tensor of the host as a tensor on `device`, without making the host wait for a GPU."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def dtype_of(precision: str) -> torch.dtype | None:
    """Return the dtype of autocast for "bf16" or "fp16"; None, no autocast, for "fp32"."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bf16 itself. CPUs count as such: PyTorch has kernels for all of them."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def computes_bf16(device: torch.device) -> bool:
    """Return whether bf16 is fast: as `has_bf16`, but of a CPU only where it has instructions for it."""
    return has_bf16(device) and (device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def default_precision(device: torch.device, strict: bool = False) -> str:
    """Return the precision if none is asked for: "bf16" on a GPU that has it, else "fp32"."""
    return "bf16" if device.type == "cuda" and not strict and has_bf16(device) else "fp32"


@cache
def can_compile() -> bool:
    """Return whether networks can be compiled for GPUs here: that takes Triton, and a C compiler for what it makes."""
    return has_triton() and any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "clang", "cc"))


def compiles(asked: bool | None, device: torch.device, strict: bool) -> bool:
    """Return whether to compile a network: as asked, else on a GPU with the compilers for it, unless `strict`.

    Unasked, what the compiler fails on runs uncompiled, with a warning.
    """
    if asked is not None:
        return asked
    chosen = device.type == "cuda" and not strict and can_compile()
    if chosen:
        torch._dynamo.config.suppress_errors = True
    return chosen


def constants(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what `function` of sizes and a device returns; compiled code holds these tensors as constants."""
    remembered = lru_cache(maxsize=16)(function)

    @wraps(function)
    def table(*arguments: Any) -> Any:
        return remembered(*arguments)

    table._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler
    return table


@contextlib.contextmanager
def autocast(device: torch.device, precision: str, *nets: nn.Module | None) -> Iterator[None]:
    """Compute in `precision` within; for fp32 this does nothing.

    nets: see `cast_weights`.
    """
    dtype = dtype_of(precision)
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype), cast_weights(dtype, *nets):
        yield


@contextlib.contextmanager
def cast_weights(dtype: torch.dtype | None, *nets: nn.Module | None) -> Iterator[None]:
    """Replace within the weights of networks on a GPU by copies in `dtype`: one call, where autocast casts one by one.

    Gradients reach the parameters by one call, too. Which layers: convolutions, linear layers and those with an
    attribute `casts_weights`. dtype None does nothing.
    """
    layers = [layer for net in nets if net is not None and dtype is not None for layer in net.modules()
              if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) or hasattr(layer, "casts_weights")]
    found = [(layer._parameters, name, value) for layer in layers for name, value in layer._parameters.items()
             if value is not None and value.dtype == torch.float32 and value.device.type in CASTING_DEVICES]
    copies = _Cast.apply(dtype, *(value for _, _, value in found)) if found else ()
    for (layer, name, _), copy in zip(found, copies, strict=True):
        layer[name] = copy
    try:
        yield
    finally:
        for layer, name, value in found:
            layer[name] = value


class _Cast(torch.autograd.Function):
    """Tensors in another dtype, and their gradients back, by one call each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_converted(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        wide = iter(_converted([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(wide) for gradient in gradients)


def _converted(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def set_arithmetic(strict: bool, tf32: bool = True, benchmark: bool = True, deterministic: bool = False) -> None:
    """Choose the kernels of this process: the fastest, found by trying (`benchmark`), or `deterministic` ones.

    tf32: whether convolutions of fp32 numbers may round them to 10 bits of mantissa, as PyTorch allows on GPUs.
    strict: deterministic and full fp32; overrules the others.
    """
    torch.backends.cudnn.benchmark = benchmark and not strict
    torch.backends.cudnn.deterministic = deterministic or strict
    torch.backends.cudnn.allow_tf32 = tf32 and not strict
    torch.backends.cuda.matmul.allow_tf32 = False
    if strict:
        torch.use_deterministic_algorithms(True, warn_only=True)


def processor() -> str:
    """Return the name of the processor ("AMD EPYC 7B13"), or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def computed_on(device: torch.device) -> dict[str, Any]:
    """Return {device, hardware, threads, torch, python} for a result file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"device": device.type, "hardware": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Return {hardware, cores, torch, python} of this machine, all of its GPUs included."""
    cards = torch.cuda.device_count()
    return {"hardware": f"{cards} x {torch.cuda.get_device_name(0)}" if cards else processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch": torch.__version__, "python": platform.python_version()}


def commit() -> str:
    """Return the commit of the code that runs, with "-changed" if files differ from it; "unknown" outside git."""
    root = Path(__file__).resolve().parents[2]
    try:
        return subprocess.run(["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*",
                               "--dirty=-changed"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
