"""The log of a run: lines on the console and in log.txt, a bar, stats.jsonl and TensorBoard.

    log = Log(outdir, world, every=100, image_batch=64)
    run = Run(outdir, config, keep, world, log=log)
    for step in run.steps(total):
        ...
        log.add(loss=loss)          # stays on the device until it is printed
"""
from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from shared import distributed
from shared.distributed import World
from shared.training.precision import to_device
from shared.training.progress import Progress


class Log:
    """Means of the steps' numbers, and lines of text; only rank 0 writes.

    outdir            the run's folder; nothing is written before the run calls `open`
    world             this process; means are over all ranks
    every             steps between two lines of means; None: only `record` writes numbers
    image_batch       images per step, to show images per second
    tensorboard       whether to write scalars to `outdir/tensorboard`, or the name of the folder in `outdir`
    stats_name        file name of the numbers in `outdir`, one JSON object a line
    desc              title of the bar
    """

    def __init__(self, outdir: str | os.PathLike, world: World, *, every: int | None = 100,
                 image_batch: int | None = None, tensorboard: bool | str = True, stats_name: str = "stats.jsonl",
                 desc: str = "train") -> None:
        self.outdir, self.world, self.every, self.image_batch = Path(outdir), world, every, image_batch
        self.tensorboard, self.stats_name, self.desc = tensorboard, stats_name, desc
        self.step = 0  # the run counts it up
        self.check: Callable[[], None] = lambda: None  # the run's: raises Diverged after a loss that was not finite
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._bad: tuple[str, int] | None = None
        self._on_gpu = SumsOnGPU()
        self._lines = self._stats = self._board = self._bar = None

    def open(self, step: int, stats_bytes: int) -> None:
        """Open the files of a run that has done `step` steps. stats_bytes: length of the file of numbers then."""
        self.step = step
        if not self.world.main:
            return
        self._lines = open(self.outdir / "log.txt", "a", encoding="utf-8")
        stats = self.outdir / self.stats_name
        self._stats = open(stats, "r+b" if stats.exists() else "w+b")
        self._stats.truncate(stats_bytes)  # later lines belong to steps that will be done again
        self._stats.seek(0, os.SEEK_END)
        if self.tensorboard:
            folder = self.tensorboard if isinstance(self.tensorboard, str) else "tensorboard"
            self._board = tensorboard_writer(self.outdir / folder, step)

    def state(self, group: dist.ProcessGroup | None) -> dict[str, Any]:
        """Return the log's part of a checkpoint (a collective): its length, and the sums since its last line.

        group: of all ranks, for tensors on the CPU; None for a single rank.
        """
        self._fetch()
        sums = torch.tensor([float(value) for value in self._sums.values()], dtype=torch.float64)
        if group is not None:
            dist.all_reduce(sums, group=group)
        self.flush()
        return {"stats_bytes": self._stats.tell() if self._stats is not None else 0, "log_counts": dict(self._counts),
                "log_sums": dict(zip(self._sums, (sums / self.world.size).tolist(), strict=True))}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        self._sums, self._counts = dict(saved.get("log_sums", {})), dict(saved.get("log_counts", {}))

    def flush(self) -> None:
        for file in (self._stats, self._lines, self._board):
            if file is not None:
                file.flush()

    # -------------------------------------------------------------------------------------------------- numbers

    def add(self, **values: torch.Tensor | float) -> None:
        """Add the step's numbers. Tensors stay on their device; those whose names contain "loss" must be finite."""
        on_gpu = {name: value for name, value in values.items() if isinstance(value, torch.Tensor) and value.is_cuda}
        if on_gpu:
            self._on_gpu.add(self.step, on_gpu)
        for name, value in values.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            self._sums.setdefault(name, 0.0)
            if name in on_gpu:
                continue
            if isinstance(value, torch.Tensor):
                value = value.detach().float().mean()
            if "loss" in name:
                self._watch(name, value)
            self._sums[name] = self._sums[name] + value

    def _watch(self, name: str, value: torch.Tensor | float) -> None:
        if not math.isfinite(float(value)):
            self._bad = name, self.step
            self.check()

    def _fetch(self) -> None:
        """Add the sums on a GPU; waits for it."""
        for name, value in self._on_gpu.take().items():
            self._sums[name] = self._sums[name] + value

    def first_bad(self) -> tuple[str, int] | None:
        """Return name and step of the first loss on this rank that was not finite, or None; waits for the device."""
        step = self._on_gpu.first_bad() if self._bad is None else None
        if step is not None:
            self._bad = "the loss", step
        return self._bad

    def means(self) -> dict[str, float]:
        """Return the means since the last call, over steps and ranks (a collective); Diverged after a bad loss."""
        self.check()
        self._fetch()
        names = list(self._sums)
        if not names:
            return {}
        sums = torch.stack([torch.as_tensor(self._sums[name], dtype=torch.float32) for name in names])
        sums = distributed.mean(to_device(sums, self.world.device), self.world)
        means = {name: value / self._counts[name] for name, value in zip(names, sums.tolist(), strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def record(self, values: Mapping[str, Any], line: Mapping[str, Any] | None = None) -> None:
        """Write numbers now: a line of stats.jsonl with the step and `values` (or exactly `line`), and TensorBoard."""
        if not self.world.main:
            return
        content = dict(line) if line is not None else {"step": self.step, **values}
        self._stats.write((json.dumps(content) + "\n").encode())
        self._stats.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, self.step)

    # ---------------------------------------------------------------------------------------------------- lines

    def print(self, text: str, console: str | None = None) -> None:
        """Append `text` to log.txt and print it, or the shorter `console`, on the console (rank 0)."""
        if self.world.main:
            (self._bar.print if self._bar is not None else print)(text if console is None else console)
            self._write(text)

    def _write(self, text: str) -> None:
        if self._lines is not None:
            self._lines.write(text + "\n")
            self._lines.flush()

    def start(self, total: int) -> None:
        """Show the bar of a run of `total` steps."""
        self._bar = Progress(self.desc, total, "it", initial=self.step, shown=self.world.main)

    def advance(self, step: int, is_last: bool) -> None:
        """Note that `step` steps are done; write a line of means if one is due."""
        self.step = step
        self._bar.advance()
        means = self.means() if self.every and (step % self.every == 0 or is_last) else {}
        if means and self.world.main:
            rate = self._bar.rate()
            self._bar.figures = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
            self._write(self._bar.line())
            speed = {"images_per_second": rate * self.image_batch} if self.image_batch else {"steps_per_second": rate}
            self.record({**means, **speed})

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.close()
        self._bar = None


def tensorboard_writer(folder: Path, step: int) -> Any:
    """Return a writer of scalars into `folder` for a run that has done `step` steps; None, with a warning, where
    tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter  # optional
    except ModuleNotFoundError:
        warnings.warn("tensorboardX is not installed, so there are no TensorBoard files", stacklevel=2)
        return None
    return SummaryWriter(str(folder), purge_step=step or None)


class SumsOnGPU:
    """Sums of the steps' numbers on a GPU. A step costs one launch, and nothing waits for the GPU before `take`."""

    ROWS, NEVER = 128, 2**62

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], list[tuple[int, torch.Tensor]]] = {}
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}
        self.bad: torch.Tensor | None = None  # the first step whose loss was not finite, or NEVER

    def add(self, step: int, values: Mapping[str, torch.Tensor]) -> None:
        """Add one number each, the mean of a larger tensor."""
        numbers = [value.detach() for value in values.values()]
        plain = [number if number.dim() == 0 and number.dtype == torch.float32 else number.float().mean()
                 for number in numbers]
        rows = self.rows.setdefault(tuple(values), [])
        rows.append((step, torch.stack(plain)))  # a copy: what is logged may be changed in place later
        if len(rows) == self.ROWS:
            self._fold()

    def _fold(self) -> None:
        for names, rows in self.rows.items():
            table = torch.stack([row for _, row in rows])
            steps = to_device(np.array([step for step, _ in rows]), table.device)
            watched = to_device(np.array(["loss" in name for name in names]), table.device)
            first = torch.where((~table.isfinite() & watched).any(1), steps, self.NEVER).amin()
            self.bad = first if self.bad is None else torch.minimum(self.bad, first)
            self.sums[names] = self.sums.get(names, 0) + table.sum(0, dtype=torch.float64)
        self.rows = {}

    def first_bad(self) -> int | None:
        """Return the first step at which a number with "loss" in its name was not finite, or None."""
        self._fold()
        step = self.NEVER if self.bad is None else int(self.bad)
        return None if step == self.NEVER else step

    def take(self) -> dict[str, float]:
        """Return the sums by name, and begin again at 0."""
        self._fold()
        found: dict[str, float] = {}
        for names, sums in self.sums.items():
            for name, value in zip(names, sums.tolist(), strict=True):
                found[name] = found.get(name, 0.0) + value
        self.sums = {}
        return found
