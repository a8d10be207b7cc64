"""What a number was computed on: processor or GPU, threads, and versions. Every result file carries it."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def processor() -> str:
    """Return the name of the processor, as the system has it ("AMD EPYC 7B13"), or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def graphics_cards() -> list[str]:
    """Return the names of the NVIDIA cards of this machine, without importing torch; empty where there are none."""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                               text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def machine() -> dict[str, Any]:
    """Return {hardware, cores, torch, python} of this machine."""
    cards = graphics_cards()
    name = f"{len(cards)} x {cards[0]}" if cards else processor()
    return {"hardware": name, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
            else os.cpu_count(), "torch": importlib.metadata.version("torch"), "python": platform.python_version()}


def computed_on(device: torch.device) -> dict[str, Any]:
    """Return {device, hardware, threads, torch, python}: the GPU's or the processor's name, and what ran on it."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"device": device.type, "hardware": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version()}


def commit() -> str:
    """Return the commit of the code that runs, with "-changed" where files differ from it; "unknown" outside git."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True,
                                 text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() + "-changed" * bool(changed.stdout.strip())
