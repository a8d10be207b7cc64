"""A training run: an output folder that resumes, saves, stops on request and finishes.

    run = Run(outdir, config, keep=dict(net=net, ema=ema, optimizer=optimizer), world=world, log=Log(outdir, world))
    for step in run.steps(total):
        ...
        run.log.add(loss=loss)

The same command again is the resume: the newest readable checkpoint in the folder is loaded into the kept objects, and
the steps go on behind it. Draws depend on the step alone (shared/training/randomness.py), so the result is bitwise that
of an uninterrupted run.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from shared import distributed
from shared.cli import MACHINE_ERRORS, Diverged, MachineError, UserError, is_out_of_memory
from shared.distributed import World
from shared.training.checkpoint import check_finite, is_readable, load_newest, read_checkpoint, write_checkpoint
from shared.training.files import lock, move_aside, sweep
from shared.training.fingerprint import fingerprints
from shared.training.log import Log
from shared.training.progress import duration

# Exit status after saving on request, as the shell reports these signals.
STOP_SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
if hasattr(signal, "SIGUSR1"):  # what SLURM sends ahead of the time limit; absent on Windows
    STOP_SIGNALS[signal.SIGUSR1] = 138


class Run:
    """An output folder with its lock, settings, inputs and checkpoints.

    outdir            made if needed, and locked while this object lives; InUse if another process works in it
    config            plain values; a checkpoint of another config is not continued
    keep              name -> object with state_dict / load_state_dict, or a network; equal on all ranks
    world             this process; only rank 0 writes
    inputs            name in messages ("--data") -> path, ImageSet, array or fingerprint; a checkpoint of another
                      content is not continued
    checkpoint        file name in `outdir`; the one before stays as `<name>.previous`
    resume            "auto": continue what is in the folder; "never": start anew; otherwise a checkpoint file,
                      which is continued whatever its config and inputs
    overwrite         whether --overwrite was given: then such a run is moved aside as `<name>.replaced-1`; None: the
                      program has no such flag
    ignore            config keys that may change between restarts (workers, devices, paths)
    extra             called at each save: further plain values or tensors for the file
    save_seconds      save when this many seconds have passed; None: never by the clock
    save_every        save after every so many steps

    Attributes: `step` (the next step), `finished`, `state` (a dict of plain values saved with the rest),
    `seconds` (spent in steps, over all restarts), `resumed_from` (the checkpoint's path or None).
    """

    def __init__(self, outdir: str | os.PathLike, config: Mapping[str, Any], keep: Mapping[str, Any], world: World, *,
                 log: Log, inputs: Mapping[str, Any] | None = None, checkpoint: str = "checkpoint.pt",
                 resume: str = "auto", overwrite: bool | None = None,
                 ignore: tuple[str, ...] = (), extra: Callable[[], Mapping[str, Any]] = dict,
                 save_seconds: float | None = 600.0, save_every: int | None = None) -> None:
        self.outdir, self.world, self.keep, self.log = Path(outdir), world, dict(keep), log
        self.config, self.ignore, self.extra = dict(config), set(ignore), extra
        self.save_seconds, self.save_every = save_seconds, save_every
        self.step, self.finished, self.state, self.seconds = 0, False, {}, 0.0
        self.resumed_from: Path | None = None
        self._path = self.outdir / checkpoint
        self._newest_is_good = False  # the file at _path may become the previous one at the next save
        self._without_inputs = False  # continued from a checkpoint without fingerprints of its inputs
        self._stop_signal: int | None = None
        self.inputs = distributed.on_main(lambda: fingerprints(inputs or {}), world)
        distributed.on_main(self._take_folder, world)
        stats_bytes = self._load(resume, overwrite)
        self._host_group = dist.new_group(backend="gloo") if world.size > 1 else None
        own = weakref.ref(self)  # the folder's lock ends with the last reference to the run, so no circle of them
        log.check = lambda: own() and own()._check_finite()
        try:
            log.open(self.step, stats_bytes)
        except OSError as error:
            raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another output folder") from None
        if self.resumed_from is not None and not self.finished:
            log.print(f"continuing at step {self.step}: {self.resumed_from} ({duration(self.seconds)} so far)")
        if self._without_inputs:
            log.print(f"{self.resumed_from} holds no fingerprints of {', '.join(self.inputs)}, as older versions wrote "
                      "it: it is continued with what is there now, and the next checkpoint holds them")
        self._last_save = time.monotonic()

    def _take_folder(self) -> None:
        """Lock the folder, then remove leftovers of processes that were killed in a save."""
        self._lock = lock(self.outdir)
        sweep(self.outdir, below=True)

    def _move_aside(self, changed: str) -> None:
        """Move the folder of another run away, and take a new one under its name."""
        aside = move_aside(self.outdir)
        print(f"{self.outdir} held a run with {changed.partition('; give')[0]}: moved to {aside}", flush=True)
        self._lock = lock(self.outdir)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def _load(self, resume: str, overwrite: bool | None) -> int:
        """Load the checkpoint to continue, if any; return the length of its log."""
        if resume == "never":
            return 0
        if resume != "auto":
            self.restore(read_checkpoint(Path(resume)), Path(resume))
            return 0
        found = load_newest(self._path)
        if found is None:
            return 0
        path, saved = found
        changed = self._changes(saved)
        if changed and overwrite:
            distributed.barrier(self.world)  # until all ranks have read it
            distributed.on_main(lambda: self._move_aside(changed), self.world)
            return 0
        self._newest_is_good = path == self._path
        if changed:
            remedy = "another output folder" if overwrite is None else ("another output folder, or --overwrite to move "
                                                                       "it aside and start anew")
            raise UserError(f"{self.outdir} holds a run with {changed}, or {remedy}")
        self.restore(saved, path, strict=True)
        self._without_inputs = bool(self.inputs) and "inputs" not in saved
        return int(saved.get("stats_bytes", 0))

    def _changes(self, saved: Mapping[str, Any]) -> str:
        """Return the differences of a checkpoint's run from this one, with the remedy, or ''."""
        before, ours = saved.get("config", {}), plain(self.config)
        changed = [f"{key} was {before.get(key)!r}, is {ours.get(key)!r}" for key in sorted({*before, *ours})
                   if key not in self.ignore and before.get(key) != ours.get(key)]
        if changed:
            return f"other settings ({'; '.join(changed[:4])}); give the settings it was started with"
        before = saved.get("inputs", self.inputs)
        changed = [name for name in {**before, **self.inputs} if before.get(name) != self.inputs.get(name)]
        if changed:
            return f"another content of {', '.join(changed)}; give what it was started with"
        return ""

    def restore(self, saved: Mapping[str, Any], path: Path, strict: bool = False) -> None:
        """Load the checkpoint `path` into the kept objects; a missing object is an error if `strict`, a missing
        network always."""
        for name, kept in self.keep.items():
            if name not in saved:
                if strict or network_in(kept) is not None:
                    raise UserError(f"{path}: it holds no {name}; it is not a checkpoint of this run")
                warnings.warn(f"{path} holds no {name}: it starts from its initial value", stacklevel=2)
                continue
            target = distributed.unwrap(kept) if isinstance(kept, torch.nn.Module) else kept
            try:
                target.load_state_dict(saved[name])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                if is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{path}: its {name} does not fit this run: {reason}") from None
            if (net := network_in(kept)) is not None:
                check_finite(net.state_dict(), f"{path}: {name}")
        self.step, self.finished = int(saved.get("step", 0)), bool(saved.get("finished", False))
        self.state, self.seconds = dict(saved.get("state", {})), float(saved.get("seconds", 0.0))
        self.log.load_state(saved)
        self.resumed_from = path

    def save(self) -> None:
        """Write the checkpoint now (rank 0 writes, all ranks call).

        Raises Diverged, and writes nothing, if a loss was not finite or the ranks no longer have the same weights.
        """
        self._check_finite()
        self._last_save = time.monotonic()
        self._check_ranks()
        log_state = self.log.state(self._host_group)
        if not self.world.main:
            return
        parts = {name: distributed.unwrap(kept).state_dict() if isinstance(kept, torch.nn.Module) else kept.state_dict()
                 for name, kept in self.keep.items()}
        write_checkpoint(self._path, {
            **parts, **self.extra(), "step": self.step, "finished": self.finished, "seconds": self.seconds,
            "state": self.state, "config": plain(self.config), "inputs": self.inputs, **log_state},
            keep_former=self._newest_is_good or is_readable(self._path))
        self._newest_is_good = True

    # ---------------------------------------------------------------------------------------------------- steps

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps from the first one not yet done up to `total` - 1, then mark the run finished and save.

        SIGTERM, SIGUSR1 (and Ctrl-C once) end the step at hand, save, and leave with status 143, 138 (130).
        """
        if self.finished and self.step >= total:
            if self._without_inputs:
                self.save()
            self.log.print(f"complete: {self.outdir}")
            return
        self.finished = False
        handlers = self._catch_signals()
        self.log.step = self.step  # a caller that continues from elsewhere has set it since
        self.log.start(total)
        try:
            while self.step < total:
                started = time.monotonic()
                yield self.step
                self.step += 1
                self.seconds += time.monotonic() - started
                self._after_step(total)
            self._check_finite(weights=True)
            self.finished = True
            self.save()
            self.log.flush()
        except OSError as error:
            if error.errno not in MACHINE_ERRORS:
                raise
            raise MachineError(f"{error.strerror}: {error.filename or self.outdir}; the last checkpoint is whole: fix "
                               "this, and the same command continues from it") from None
        finally:
            self.log.stop()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            with suppress(OSError):  # already reported by the original error
                self.log.flush()

    def _after_step(self, total: int) -> None:
        self.log.advance(self.step, is_last=self.step == total)
        clock = self.save_seconds is not None and time.monotonic() - self._last_save >= self.save_seconds
        counted = self.save_every is not None and self.step % self.save_every == 0
        stop, clock = self._agreed(clock)
        if stop or (clock or counted) and self.step < total:  # after the last step, `steps` saves
            self.save()
        if stop:
            self.log.print(f"stopped by {signal.Signals(stop).name} after step {self.step}; "
                           "the same command continues from here")
            distributed.stop()
            sys.exit(STOP_SIGNALS[signal.Signals(stop)])

    def _catch_signals(self) -> dict[int, Any]:
        def remember(number: int, frame: FrameType | None) -> None:
            if self._stop_signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self._stop_signal = number

        try:
            return {number: signal.signal(number, remember) for number in STOP_SIGNALS}
        except ValueError:  # not the main thread, where Python allows no handlers
            return {}

    def _agreed(self, clock: bool) -> tuple[int, bool]:
        """Return the signal that any rank received, and whether any rank's clock says that it is time to save.

        All ranks leave, or save, after the same step; otherwise a collective deadlocks.
        """
        own = int(self._stop_signal or 0)
        if self._host_group is None:
            return own, clock
        # On the host, beside the devices' streams: the GPU is not waited for.
        agreed = torch.tensor([own, clock])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(agreed[0]), bool(agreed[1])

    # --------------------------------------------------------------------------------------------------- checks

    def _check_finite(self, weights: bool = False) -> None:
        """Raise Diverged if a loss was not finite, or (`weights`) if a weight of a kept network is not."""
        bad = self.log.first_bad()
        first = self._first_bad_tensor() if bad or weights else None
        if bad is None and first is None:
            return
        name, step = bad or ("a weight", self.step - 1)
        tensors = f"; the first non-finite tensor is {first}" if first else "; all weights are finite"
        raise Diverged(f"{name} is not finite at step {step} on rank {self.world.rank}{tensors}; nothing was saved, "
                       f"{self.outdir} keeps its last checkpoint. Try a lower learning rate, or fp32 where it "
                       "computes in another format")

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and values of the parameters and buffers of the kept networks and averages."""
        for part, kept in self.keep.items():
            if (net := network_in(kept)) is not None:
                for name, tensor in net.state_dict().items():
                    yield f"{part}.{name}", tensor

    def _first_bad_tensor(self) -> str | None:
        return next((name for name, tensor in self._tensors()
                     if tensor.is_floating_point() and not torch.isfinite(tensor).all()), None)

    def _check_ranks(self) -> None:
        """Raise Diverged unless the kept networks and averages have the same bits on all ranks (a collective)."""
        if self.world.size > 1:
            distributed.check_equal(dict(self._tensors()), self.world, f"after step {self.step}; nothing was saved, "
                                    f"{self.outdir} keeps its last checkpoint, from which the same command continues")


def network_in(kept: Any) -> torch.nn.Module | None:
    """Return the network that a kept object is, or is an average of; None for anything else."""
    net = getattr(kept, "module", kept)
    return distributed.unwrap(net) if isinstance(net, torch.nn.Module) else None


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as JSON gives them back."""
    return json.loads(json.dumps(dict(values), default=str))
