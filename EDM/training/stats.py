"""The reports of a training run: the table of its network, status lines, stats.jsonl, and the times of snapshots."""
from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

GIB = 2 ** 30
TABLE_DEPTH = 2  # calls within calls


@dataclass(frozen=True)
class TickSchedule:
    """The steps of a run that end it, have a tick, or write files.

    batch: images per step. total_kimg: length of the run. kimg_per_tick: images between ticks. (kimg: thousands of
    images.) snapshot_ticks, state_dump_ticks: ticks between two network snapshots and two training states.
    start_nimg: images seen before step 0, in a run that goes on from another one.
    """

    batch: int
    total_kimg: int
    kimg_per_tick: int
    snapshot_ticks: int
    state_dump_ticks: int
    start_nimg: int = 0

    @property
    def steps(self) -> int:
        return max(math.ceil((self.total_kimg * 1000 - self.start_nimg) / self.batch), 1)

    def nimg(self, step: int) -> int:
        """Return the number of images seen before `step`."""
        return self.start_nimg + step * self.batch

    def is_last(self, step: int) -> bool:
        return step == self.steps - 1

    def tick(self, step: int) -> int | None:
        """Return the number of the tick that follows `step`, or None.

        The first step has one, then every kimg_per_tick thousand images (rounded up to whole steps), and the last.
        """
        between = math.ceil(self.kimg_per_tick * 1000 / self.batch)
        number, rest = divmod(step, between)
        if rest == 0:
            return number
        return number + 1 if self.is_last(step) else None

    def snapshot(self, step: int) -> str | None:
        """Return the name of the snapshot to be written after `step`, or None."""
        tick = self.tick(step)
        due = tick is not None and (self.is_last(step) or tick % self.snapshot_ticks == 0)
        return f"network-snapshot-{self.nimg(step + 1) // 1000:06d}.pkl" if due else None

    def state_dump(self, step: int) -> str | None:
        """Return the name of the training state to be written after `step`, or None."""
        tick = self.tick(step)
        due = tick is not None and (self.is_last(step) or (tick % self.state_dump_ticks == 0 and tick > 0))
        return f"training-state-{self.nimg(step + 1) // 1000:06d}.pt" if due else None


def format_time(seconds: float) -> str:
    """Return 42 as '42s', 60 as '1m 00s', 3600 as '1h 00m 00s', 200000.7 as '2d 07h 33m'."""
    s = int(np.rint(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02d}m {s % 60:02d}s"
    return f"{s // 86400}d {s // 3600 % 24:02d}h {s // 60 % 60:02d}m"


class Moments:
    """Count, mean and standard deviation of all elements reported since the last reset, over all ranks.

    Sums are kept on the device in float64 (float32 where a device has no float64); nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, count: int, sums: torch.Tensor) -> None:
        """Add `count` elements with `sums` [2]: their sum and the sum of their squares, any float dtype."""
        self.count += count
        self.sums += sums

    def entry(self) -> dict[str, float]:
        """Return {num, mean, std} (population) and reset."""
        if not self.count:
            return {"num": 0, "mean": float("nan"), "std": float("nan")}
        mean, square = (self.sums / self.count).tolist()
        entry = {"num": self.count, "mean": mean, "std": math.sqrt(max(square - mean ** 2, 0.0))}
        self.count = 0
        self.sums.zero_()
        return entry

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])
        self.sums.copy_(state["sums"])


class TickClock:
    """Times and memory of a run from tick to tick. before: seconds spent on it before this process took it up."""

    def __init__(self, device: torch.device, before: float, nimg: int) -> None:
        self.device, self.begin = device, time.time() - before
        self.tick_start, self.tick_nimg, self.maintenance = time.time(), nimg, 0.0

    def measure(self, tick: int, nimg: int) -> dict[str, float]:
        """Return the tick's progress, timing and resources under their names in stats.jsonl."""
        allocated = reserved = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            allocated = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.tick_end = time.time()
        seconds = self.tick_end - self.tick_start
        kimg = max(nimg - self.tick_nimg, 1) / 1000
        self.tick_nimg = nimg
        return {"Progress/tick": tick, "Progress/kimg": nimg / 1000,
                "Timing/total_sec": self.tick_end - self.begin, "Timing/sec_per_tick": seconds,
                "Timing/sec_per_kimg": seconds / kimg, "Timing/maintenance_sec": self.maintenance,
                "Resources/cpu_mem_gb": resident_memory() / GIB,
                "Resources/peak_gpu_mem_gb": allocated / GIB, "Resources/peak_gpu_mem_reserved_gb": reserved / GIB}

    def resume(self) -> None:
        """Mark the end of the tick's own work (files and lines), which counts as maintenance of the next tick."""
        self.tick_start = time.time()
        self.maintenance = self.tick_start - self.tick_end


def resident_memory() -> int:
    """Return the bytes of memory that this process holds; without Linux's /proc, the most that it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def status_line(values: Mapping[str, float]) -> str:
    """Return the published status line of one tick from `TickClock.measure`."""
    return " ".join([
        f"tick {values['Progress/tick']:<5d}",
        f"kimg {values['Progress/kimg']:<9.1f}",
        f"time {format_time(values['Timing/total_sec']):<12s}",
        f"sec/tick {values['Timing/sec_per_tick']:<7.1f}",
        f"sec/kimg {values['Timing/sec_per_kimg']:<7.2f}",
        f"maintenance {values['Timing/maintenance_sec']:<6.1f}",
        f"cpumem {values['Resources/cpu_mem_gb']:<6.2f}",
        f"gpumem {values['Resources/peak_gpu_mem_gb']:<6.2f}",
        f"reserved {values['Resources/peak_gpu_mem_reserved_gb']:<6.2f}"])


def stats_line(loss: Mapping[str, float], values: Mapping[str, float]) -> dict[str, Any]:
    """Return one line of stats.jsonl: {num, mean, std} for the loss and for each value of the tick, and the time."""
    line: dict[str, Any] = {"Loss/loss": dict(loss)}
    for name, value in values.items():
        line[name] = {"num": 1, "mean": float(np.float32(value)), "std": 0.0}
    line["timestamp"] = time.time()
    return line


@torch.no_grad()
def module_table(net: torch.nn.Module, batch: int) -> str:
    """Return a table of the modules that a preconditioned network calls, down to calls within calls within the network.

    The shapes are those for `batch` images, found with a single one. A parameter is counted in the first row it belongs
    to: the columns add up. Raises RuntimeError or ZeroDivisionError for a network that does not fit its images.
    """
    names = {module: name or "<top-level>" for name, module in net.named_modules()}
    rows: list[tuple[str, ...]] = []
    depth, counted = 0, set()

    def count(tensors: Iterable[torch.Tensor]) -> str:
        new = {id(tensor): tensor for tensor in tensors if id(tensor) not in counted}
        counted.update(new)
        return str(sum(tensor.numel() for tensor in new.values()) or "-")

    def enter(module: torch.nn.Module, inputs: tuple) -> None:
        nonlocal depth
        depth += 1

    def leave(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal depth
        depth -= 1
        output = output[0] if isinstance(output, tuple) else output  # of a classifier with a transition matrix
        if depth <= TABLE_DEPTH:
            rows.append((names[module], count(module.parameters()), count(module.buffers()),
                         str([batch, *output.shape[1:]]), str(output.dtype).removeprefix("torch.")))

    hooks = [hook for module in names for hook in (module.register_forward_pre_hook(enter),
                                                   module.register_forward_hook(leave))]
    training, device = net.training, next(net.parameters()).device
    try:
        image = torch.zeros([1, net.img_channels, net.img_resolution, net.img_resolution], device=device)
        net.eval()(image, torch.ones([1], device=device), torch.zeros([1, net.label_dim], device=device))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()

    counted.clear()
    total = ("Total", count(net.parameters()), count(net.buffers()), "-", "-")
    rows = [("Module", "Parameters", "Buffers", "Output shape", "Datatype"), *rows, total]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(["", lines[0], rule, *lines[1:-1], rule, lines[-1], ""])
