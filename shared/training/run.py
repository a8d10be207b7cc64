"""A training run: an output folder that resumes, saves, logs, stops on request and finishes.

    run = Run(outdir, config, keep=dict(net=net, ema=ema, optimizer=optimizer), world=world)
    for step in run.steps(total):
        ...
        run.log(loss=loss)          # stays on the device until it is printed

The same command again is the resume: the newest complete checkpoint in the folder is loaded into the kept objects and
the steps go on behind it. Because draws depend on the step alone (shared/training/randomness.py), the result is bitwise
that of
an uninterrupted run.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from shared import distributed
from shared.cli import MACHINE_ERRORS, Diverged, MachineError, UserError
from shared.distributed import World
from shared.training.checkpoint import load_newest, read_checkpoint, write_checkpoint
from shared.training.files import make_dir
from shared.training.progress import Progress, duration

# Exit status after saving on request, as the shell reports these signals.
STOP_SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
if hasattr(signal, "SIGUSR1"):  # what SLURM sends ahead of the time limit; absent on Windows
    STOP_SIGNALS[signal.SIGUSR1] = 138


class Run:
    """An output folder with its config, log, progress and checkpoints.

    outdir            created if needed
    config            plain values; a checkpoint made with another config is not continued (see `restart`)
    keep              name -> object with state_dict / load_state_dict, or a network; equal on all ranks
    world             this process; only rank 0 writes
    checkpoint        file name in `outdir`, or None to keep nothing; the one before stays as `<name>.previous`
    resume            "auto": continue what is in the folder; "never": start anew; otherwise a checkpoint file,
                      which is continued whatever its config
    restart           what to do about a checkpoint of another config: False raises UserError, True starts anew
    ignore            config keys that may change between restarts (workers, devices, paths)
    extra             called at each save: further plain values or tensors for the file
    save_seconds      save when this many seconds have passed, None: never by the clock
    save_every        save after every so many steps
    log_every         steps between two lines of the log; what `log` was given is averaged over them and over ranks
    image_batch       images per step, to show images per second
    tensorboard       also write TensorBoard scalars to `outdir/tensorboard`, or to the folder of that name in `outdir`
    stats_name        file name of the log in `outdir`

    Attributes: `step` (the next step), `finished`, `state` (a dict of plain values saved with the rest),
    `seconds` (spent in steps, over all restarts), `resumed_from` (the checkpoint's path or None).
    """

    def __init__(self, outdir: str | os.PathLike, config: Mapping[str, Any], keep: Mapping[str, Any], world: World, *,
                 checkpoint: str | None = "checkpoint.pt", resume: str = "auto", restart: bool = False,
                 ignore: tuple[str, ...] = (), extra: Callable[[], Mapping[str, Any]] = dict,
                 save_seconds: float | None = 600.0, save_every: int | None = None, log_every: int = 100,
                 image_batch: int | None = None, tensorboard: bool | str = True, desc: str = "train",
                 stats_name: str = "stats.jsonl") -> None:
        self.outdir, self.world, self.config, self.keep = Path(outdir), world, dict(config), dict(keep)
        self.ignore, self.extra = set(ignore), extra
        self.save_seconds, self.save_every, self.log_every = save_seconds, save_every, log_every
        self.image_batch, self.desc, self.stats_name = image_batch, desc, stats_name
        self.step, self.finished, self.state, self.seconds = 0, False, {}, 0.0
        self.resumed_from: Path | None = None
        self._stop_signal: int | None = None
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._first_bad: torch.Tensor | None = None
        self._bar: Progress | None = None
        if world.main:
            make_dir(self.outdir)
        distributed.barrier(world)
        self._path = self.outdir / checkpoint if checkpoint else None
        for left in self.outdir.glob(f".{checkpoint}.*.tmp") if world.main else ():  # by a process killed in a save
            left.unlink(missing_ok=True)
        stats_bytes = self._load(resume, restart)
        self._host_group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._stats = self._log_file = self._board = None
        if world.main:
            self._open_logs(stats_bytes, tensorboard)
        self._last_save = time.monotonic()

    # ---------------------------------------------------------------------------------------------- checkpoints

    def _load(self, resume: str, restart: bool) -> int:
        """Load what there is to continue; return the length of the log that belongs to it."""
        if resume == "never" or (resume == "auto" and self._path is None):
            return 0
        if resume == "auto":
            found = load_newest(self._path)
            if found is None:
                return 0
            path, saved = found
            changed = self._changed(saved.get("config", {}))
            if changed and restart:
                return 0
            if changed:
                raise UserError(f"{self.outdir} holds a run with other settings ({'; '.join(changed[:4])}); "
                                "give the settings it was started with, or another output folder")
        else:
            path, saved = Path(resume), read_checkpoint(Path(resume))
        self.restore(saved, path, strict=resume == "auto")
        return int(saved.get("stats_bytes", 0)) if resume == "auto" else 0

    def _changed(self, saved: Mapping[str, Any]) -> list[str]:
        ours = json.loads(json.dumps(self.config, default=str))
        return [f"{key} was {saved.get(key)!r}, is {ours.get(key)!r}" for key in sorted({*saved, *ours})
                if key not in self.ignore and saved.get(key) != ours.get(key)]

    def restore(self, saved: Mapping[str, Any], path: Path, strict: bool = False) -> None:
        """Load the content of the checkpoint `path` into the kept objects; what it lacks is an error if `strict`."""
        for name, kept in self.keep.items():
            if name not in saved:
                if strict:
                    raise UserError(f"{path}: it holds no {name}; it is not a checkpoint of this run")
                warnings.warn(f"{path} holds no {name}: it starts from its initial value", stacklevel=2)
                continue
            target = distributed.unwrap(kept) if isinstance(kept, torch.nn.Module) else kept
            try:
                target.load_state_dict(saved[name])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{path}: its {name} does not fit this run: {reason}") from None
        self.step, self.finished = int(saved.get("step", 0)), bool(saved.get("finished", False))
        self._sums, self._counts = dict(saved.get("log_sums", {})), dict(saved.get("log_counts", {}))
        self.state, self.seconds = dict(saved.get("state", {})), float(saved.get("seconds", 0.0))
        self.resumed_from = path

    def save(self) -> None:
        """Write the checkpoint now (rank 0 writes, all ranks call). A run whose loss is not finite, or whose ranks no
        longer have the same weights, is stopped instead."""
        self._check_finite()
        self._last_save = time.monotonic()
        if self._path is None:
            return
        self._check_ranks()
        log_sums = self._mean_sums()
        if not self.world.main:
            return
        self._stats.flush()
        parts = {name: distributed.unwrap(kept).state_dict() if isinstance(kept, torch.nn.Module) else kept.state_dict()
                 for name, kept in self.keep.items()}
        write_checkpoint(self._path, {
            **parts, **self.extra(), "step": self.step, "finished": self.finished, "seconds": self.seconds,
            "state": self.state, "config": json.loads(json.dumps(self.config, default=str)),
            "stats_bytes": self._stats.tell(), "log_counts": self._counts, "log_sums": log_sums})

    # ---------------------------------------------------------------------------------------------------- steps

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps from the first one not yet done up to `total` - 1, then mark the run finished and save.

        SIGTERM, SIGUSR1 (and Ctrl-C once) end the step at hand, save, and leave with status 143, 138 (130).
        """
        self.finished = self.finished and self.step >= total
        handlers = self._catch_signals()
        self._bar = Progress(self.desc, total, "it", initial=self.step, shown=self.world.main)
        try:
            while self.step < total:
                started = time.monotonic()
                yield self.step
                self.step += 1
                self.seconds += time.monotonic() - started
                self._bar.advance()
                self._after_step(total)
            if not self.finished:
                self.finished = True
                self.save()
            self._flush()
        except OSError as error:
            if error.errno not in MACHINE_ERRORS:
                raise
            raise MachineError(f"{error.strerror}: {error.filename or self.outdir}; the last checkpoint is whole: mend "
                               "this, and the same command continues from it") from None
        finally:
            self._bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            with contextlib.suppress(OSError):  # of which the error under way tells already
                self._flush()

    def _flush(self) -> None:
        for file in (self._stats, self._log_file, self._board):
            if file is not None:
                file.flush()

    def _after_step(self, total: int) -> None:
        if self.step % self.log_every == 0 or self.step == total:
            self._print_log()
        clock = self.save_seconds is not None and time.monotonic() - self._last_save >= self.save_seconds
        counted = self.save_every is not None and self.step % self.save_every == 0
        stop, clock = self._agreed(clock)
        if stop or clock or counted:
            self.save()
        if stop:
            self.print(f"stopped by {signal.Signals(stop).name} after step {self.step}; "
                       "the same command continues from here")
            distributed.stop()
            sys.exit(STOP_SIGNALS[signal.Signals(stop)])

    def _catch_signals(self) -> dict[int, Any]:
        def note(number: int, frame: FrameType | None) -> None:
            if self._stop_signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self._stop_signal = number

        try:
            return {number: signal.signal(number, note) for number in STOP_SIGNALS}
        except ValueError:  # not the main thread, where Python allows no handlers
            return {}

    def _agreed(self, clock: bool) -> tuple[int, bool]:
        """Return the signal that any rank has received, and whether it is time to save on any rank's clock: all ranks
        leave, or save, after the same step, or one would wait."""
        own = int(self._stop_signal or 0)
        if self._host_group is None:
            return own, clock
        # On the host, beside the devices' streams: the GPU is not waited for.
        agreed = torch.tensor([own, clock])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(agreed[0]), bool(agreed[1])

    # ------------------------------------------------------------------------------------------------------ log

    def log(self, **values: torch.Tensor | float) -> None:
        """Add the step's numbers. Tensors stay on their device; those of losses must remain finite.

        Printed, and written to stats.jsonl and TensorBoard, as means over `log_every` steps and all ranks.
        """
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().float().mean()
            if "loss" in name:
                self._watch(name, value)
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def _watch(self, name: str, value: torch.Tensor | float) -> None:
        if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
            if not math.isfinite(float(value)):
                self._diverged(name, self.step)
            return
        # On a GPU the verdict stays there until the next line of the log, so that nothing waits for it.
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, device=value.device)
        bad = (self._first_bad < 0) & ~torch.isfinite(value)
        self._first_bad = torch.where(bad, self.step, self._first_bad)

    def _check_finite(self) -> None:
        if self._first_bad is not None and int(self._first_bad) >= 0:
            self._diverged("the loss", int(self._first_bad))

    def _diverged(self, name: str, step: int) -> None:
        first = next((f"{part}.{key}" for part, kept in self.keep.items() if isinstance(kept, torch.nn.Module)
                      for key, value in distributed.unwrap(kept).state_dict().items()
                      if value.is_floating_point() and not torch.isfinite(value).all()), None)
        tensors = f"; the first non-finite tensor is {first}" if first else "; all weights are finite"
        raise Diverged(f"{name} is not finite at step {step} on rank {self.world.rank}{tensors}; nothing was saved, "
                       f"{self.outdir} keeps its last checkpoint. Try a lower learning rate or --precision fp32")

    def _check_ranks(self) -> None:
        """Raise Diverged unless the kept networks and averages have the same bits on all ranks (a collective)."""
        nets = {part: distributed.unwrap(getattr(kept, "module", kept)) for part, kept in self.keep.items()}
        tensors = {f"{part}.{name}": tensor for part, net in nets.items() if isinstance(net, torch.nn.Module)
                   for name, tensor in net.state_dict().items()}
        distributed.check_equal(tensors, self.world, f"after step {self.step}; nothing was saved, {self.outdir} keeps "
                                "its last checkpoint, from which the same command continues")

    def _mean_sums(self) -> dict[str, float]:
        """Return what was logged since the last line of the log: sums over steps, means over ranks (a collective)."""
        sums = torch.tensor([float(value) for value in self._sums.values()], dtype=torch.float64)
        if self._host_group is not None:
            dist.all_reduce(sums, group=self._host_group)
        return dict(zip(self._sums, (sums / self.world.size).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Return and reset the means of what was logged since the last call, over all ranks (a collective)."""
        self._check_finite()
        names = list(self._sums)
        if not names:
            return {}
        device = self.world.device
        sums = torch.stack([torch.as_tensor(self._sums[n], dtype=torch.float32, device=device) for n in names])
        sums = distributed.mean(sums, self.world)
        means = {name: value / self._counts[name] for name, value in zip(names, sums.tolist(), strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def _print_log(self) -> None:
        means = self.means()
        if not means or not self.world.main:
            return
        rate = self._bar.rate()
        figures = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self._bar.note(figures)
        self._log_file.write(self._bar.line() + "\n")
        self._log_file.flush()
        speed = {"images_per_second": rate * self.image_batch} if self.image_batch else {"steps_per_second": rate}
        self.record({**means, **speed})

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

    def print(self, text: str, console: str | None = None) -> None:
        """Append `text` to log.txt and print it, or the shorter `console`, on the console (rank 0)."""
        if self.world.main:
            (self._bar.print if self._bar is not None else print)(text if console is None else console)
            self._log_file.write(text + "\n")
            self._log_file.flush()

    def _open_logs(self, stats_bytes: int, tensorboard: bool | str) -> None:
        self._log_file = open(self.outdir / "log.txt", "a", encoding="utf-8")
        # Lines written after the checkpoint belong to steps that will be done again.
        stats = self.outdir / self.stats_name
        self._stats = open(stats, "r+b" if stats.exists() else "w+b")
        self._stats.truncate(stats_bytes)
        self._stats.seek(0, os.SEEK_END)
        if tensorboard:
            from tensorboardX import SummaryWriter

            folder = self.outdir / (tensorboard if isinstance(tensorboard, str) else "tensorboard")
            self._board = SummaryWriter(str(folder), purge_step=self.step or None)
        if self.resumed_from is not None:
            state = "finished after" if self.finished else "continuing at"
            self.print(f"{state} step {self.step}: {self.resumed_from} ({duration(self.seconds)} so far)")
