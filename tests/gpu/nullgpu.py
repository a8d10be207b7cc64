"""Run a script on GPUs that are not there, and count what it asks of them.

    python nullgpu.py [--gpus 2] [--memory GIB] [--ranks 2] [--launches-by-line] [--json FILE] SCRIPT ARGS...
    python nullgpu.py --programs [--json FILE] LIST.json    # several in one process: see tests/gpu/measure.py

PyTorch's own CUDA code runs, with its checks, its allocator and its launches; the kernels do nothing. See README.md.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import gc
import importlib.abc
import importlib.util
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# As in nullgpu.h.
FIELDS = ("kernels", "triton", "gemm", "conv", "library", "h2d", "h2d_pageable", "d2h", "d2h_pageable", "d2d", "fills",
          "waits", "device_allocations", "pinned_allocations")
LAUNCH, WAIT, PAGEABLE = 1, 2, 4
ROWS = (
    ("launches", "launches in all"), ("kernels", "  PyTorch's own kernels"), ("triton", "  compiled (Triton, NVRTC)"),
    ("gemm", "  cuBLAS products"), ("conv", "  cuDNN"), ("library", "  other library calls"),
    ("h2d", "copies to the GPU"), ("h2d_pageable", "  of them from pageable memory"), ("d2h", "copies from the GPU"),
    ("d2h_pageable", "  of them to pageable memory"), ("d2d", "copies on the GPU"), ("fills", "fills (memset)"),
    ("waits", "waits of the host for the GPU"), ("device_allocations", "cudaMalloc"),
    ("pinned_allocations", "cudaHostAlloc"))
BACKWARD = "(backward pass)"
SKIP = ("shared.training.run:Run._check_finite",)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nullgpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, help="GPUs of the pretended machine [1, or as many as --ranks]")
    parser.add_argument("--memory", type=float, default=139.0, metavar="GIB", help="memory of each [139]; where it is "
                        "used up, PyTorch reports that it is out of memory")
    parser.add_argument("--capability", default="9.0", help="compute capability: 7.0, 8.0, 9.0... [9.0]")
    parser.add_argument("--ranks", type=int, default=1, help="pretend to be rank 0 of so many on NCCL [1]")
    parser.add_argument("--launches-by-line", action="store_true", help="also which lines launch most (slower)")
    parser.add_argument("--kernels", action="store_true", help="also which kernels are launched most (slower)")
    parser.add_argument("--lines", type=int, default=20, help="lines of each list that are printed [20]")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are left out of all figures [2]")
    parser.add_argument("--steps", metavar="MODULE:NAME", default="shared.training.run:Run.steps", help="function that "
                        "returns an iterator over training steps [shared.training.run:Run.steps]")
    parser.add_argument("--skip", metavar="MODULE:NAME[=VALUE]", action="append", default=[], help="function or "
                        "property to leave out because it acts on values read from the GPU; it gives VALUE (JSON), or "
                        "None. " + " and ".join(SKIP) + " are always left out where they exist")
    parser.add_argument("--true-byte", type=int, default=1, choices=(0, 1), help="what single bytes (truth values) "
                        "read from the GPU are [1]; everything else reads as 0")
    parser.add_argument("--root", type=Path, help="folder of the project [around SCRIPT, up to .git or pyproject.toml]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parser.add_argument("--programs", action="store_true", help="SCRIPT is a JSON list of {name, folder, script, "
                        "args}: run each in its folder; the result is a JSON object by name")
    parser.add_argument("script", type=Path, metavar="SCRIPT")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS")
    options = parser.parse_args(argv)
    if not options.script.is_file():
        parser.error(f"no such script: {options.script}")
    options.gpus = options.gpus or options.ranks
    try:
        options.skip = [(name, json.loads(value or "null")) for name, _, value in
                        (skip.partition("=") for skip in (*SKIP, *options.skip))]
    except ValueError as error:
        parser.error(f"--skip: a value is not JSON: {error}")
    options.script = options.script.absolute()
    if options.root is None:
        marked = [folder for folder in options.script.parents if (folder / ".git").exists()
                  or (folder / "pyproject.toml").exists()]
        options.root = marked[0] if marked else options.script.parent
    return options


def enter(options: argparse.Namespace) -> None:
    """Start this program again with the null GPU loaded ahead of CUDA's libraries."""
    from build import NVRTC, library

    path = library()
    environment = {
        **os.environ, "LD_PRELOAD": f"{path} {path.parent / NVRTC}", "NULLGPU": str(path),
        "NULLGPU_GPUS": str(options.gpus), "NULLGPU_MEMORY": str(int(options.memory * 2 ** 30)),
        "NULLGPU_CAPABILITY": options.capability, "NULLGPU_TRUE": str(options.true_byte),
        "TRITON_LIBCUDA_PATH": str(path.parent),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(path.parent), os.environ.get("LD_LIBRARY_PATH")])),
        # What is compiled for the null GPU must not reach the caches of real ones.
        "TRITON_CACHE_DIR": str(path.parent / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(path.parent / "inductor"),
        "USE_PYTORCH_KERNEL_CACHE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # of a launcher
        environment.pop(name, None)
    if options.ranks > 1:
        environment.update(RANK="0", WORLD_SIZE=str(options.ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(options.ranks),
                           MASTER_ADDR="localhost", MASTER_PORT="29999")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]], environment)


# --------------------------------------------------------------------------------------------------- counting

class Counts(ctypes.Structure):
    """The counters of the null GPU."""

    _fields_ = [(name, ctypes.c_long) for name in FIELDS]


class Recorder:
    """Counts of each step, and which lines of the project they come from."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.root, self.warmup = os.path.realpath(options.root) + os.sep, options.warmup
        self.library = ctypes.CDLL(os.environ["NULLGPU"])
        self.library.null_peak.restype = ctypes.c_size_t
        self.counts = Counts.in_dll(self.library, "null_counts")
        self.steps: list[dict[str, int]] = []
        self.lines = {kind: collections.Counter() for kind in (LAUNCH, WAIT, PAGEABLE)}
        self.kernels: collections.Counter = collections.Counter()
        self.peak, self.held = {}, self.memory_at_start()
        self.files: dict[str, str] = {}
        self.counting, self.whole_steps = False, None  # lines up to the last step that was not broken off
        kinds = WAIT | PAGEABLE | (LAUNCH if options.launches_by_line or options.kernels else 0)
        self._listen = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)(self.heard)
        self.library.null_listen(self._listen, kinds)

    def within(self, file: str) -> str:
        """The file's path within the project, "" for one that is not of it."""
        if file not in self.files:
            path = os.path.realpath(file)
            own = path.startswith(self.root) and os.path.isabs(file) and "site-packages" not in path
            own = own and not path.startswith(HERE)
            self.files[file] = path[len(self.root):] if own else ""
        return self.files[file]

    def where(self, depth: int = 2) -> str:
        """The innermost `depth` lines of the project that are being run, inner one first."""
        frame, found = sys._getframe(1), []
        while frame is not None and len(found) < depth:
            if file := self.within(frame.f_code.co_filename):
                found.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
            frame = frame.f_back
        return " < ".join(found) or BACKWARD

    def heard(self, kind: int, name: bytes) -> None:
        """Called by the null GPU, on any thread."""
        if self.counting:
            where = self.where(1 if kind == LAUNCH else 2)
            self.lines[kind][where if kind == LAUNCH else f"{where}  [{name.decode()}]"] += 1
            if kind == LAUNCH:
                self.kernels[name] += 1

    def snapshot(self) -> dict[str, int]:
        return {name: getattr(self.counts, name) for name in FIELDS}

    def lines_so_far(self) -> tuple[dict[int, collections.Counter], collections.Counter]:
        return {kind: counter.copy() for kind, counter in self.lines.items()}, self.kernels.copy()

    def memory_at_start(self) -> dict[int, int]:
        """What programs before have left on each GPU (cached tables); the peaks begin there."""
        gc.collect()
        gc.freeze()  # so that the collection before each step is quick
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self.start_peak()
        return {gpu: torch.cuda.memory_allocated(gpu) for gpu in self.gpus()}

    def gpus(self) -> range:
        torch = sys.modules["torch"]
        return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)

    def start_peak(self) -> None:
        for gpu in self.gpus():
            sys.modules["torch"].cuda.reset_peak_memory_stats(gpu)

    def note_memory(self) -> int:
        """Note the peaks since `start_peak`, and return that of the first GPU."""
        peaks = {gpu: sys.modules["torch"].cuda.max_memory_allocated(gpu) - self.held.get(gpu, 0)
                 for gpu in self.gpus()}
        self.peak.update((gpu, max(self.peak.get(gpu, 0), peak)) for gpu, peak in peaks.items())
        return peaks.get(0, 0)

    def over_steps(self, function: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        """`function` returns an iterator over steps; count from one of them to the next."""

        @functools.wraps(function)
        def counted(*args: Any, **keywords: Any) -> Iterator[Any]:
            before = body = None
            with contextlib.closing(function(*args, **keywords)) as steps:
                for step in steps:
                    if before is not None:
                        self.finish(before, self.snapshot())
                    self.counting = len(self.steps) >= self.warmup
                    self.note_memory()
                    gc.collect()  # or the peak would depend on when Python last looked for cycles
                    self.start_peak()
                    before, self.whole_steps = self.snapshot(), self.lines_so_far()
                    yield step
                    body, self.whole_steps = self.snapshot(), self.lines_so_far()
                self.counting = False
                if before is not None:  # what follows the last step (saving) belongs to none
                    self.finish(before, body)
        return counted

    def finish(self, before: dict[str, int], after: dict[str, int]) -> None:
        counts = {name: after[name] - before[name] for name in FIELDS}
        self.steps.append({"launches": sum(counts[name] for name in FIELDS[:5]), **counts, "peak": self.note_memory()})

    def close(self) -> None:
        self.counting = False
        if self.whole_steps is not None:
            self.lines, self.kernels = self.whole_steps
        self.library.null_listen(None, 0)
        self.note_memory()


class Patches(importlib.abc.MetaPathFinder):
    """Replaces functions MODULE:NAME right after their module is imported."""

    def __init__(self, patches: dict[str, Callable[[Any], Any]]) -> None:
        self.patches, self.applied = patches, set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        wanted = [patch for patch in self.patches if patch.partition(":")[0] == name]
        if not wanted:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                for patch in wanted:
                    self.apply(patch, module)
            spec.loader.exec_module = exec_module
        return spec

    def apply(self, patch: str, module: Any) -> None:
        *owners, last = patch.partition(":")[2].split(".")
        try:
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, last, self.patches[patch](getattr(owner, last)))
        except AttributeError:
            print(f"null GPU: there is no {patch}", file=sys.stderr)
        else:
            self.applied.add(patch)


def constant(value: Any) -> Callable[[Any], Any]:
    """What replaces a function or property by one that always gives `value`."""
    return lambda original: (property if isinstance(original, property) else lambda function: function)(
        lambda *args, **keywords: value)


# ---------------------------------------------------------------------------------------------------- running

def run(options: argparse.Namespace) -> int:
    """Run the script, or each of the programs, as __main__; report; return its exit status, or that of the last."""
    if options.programs:
        programs = json.loads(options.script.read_text())
    else:
        programs = [{"name": "", "folder": os.getcwd(), "script": str(options.script), "args": options.args}]
    current: list[Recorder] = []

    def over_steps(function: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        return functools.wraps(function)(lambda *args, **keywords: current[-1].over_steps(function)(*args, **keywords))

    patches = Patches({options.steps: over_steps})
    patches.patches.update((name, constant(value)) for name, value in options.skip)
    sys.meta_path.insert(0, patches)
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # its plans are not offered; PyTorch's own attention is counted
    # Whether a factorisation failed is read from the GPU as a truth value.
    verdict = torch.library.Library("aten", "IMPL")
    verdict.impl("_linalg_check_errors", lambda infos, name, *, is_matrix: None, "CUDA")
    ranks = None
    if options.ranks > 1:
        from pretended_ranks import Ranks

        ranks = Ranks(options.ranks, lambda: current[-1].where())
        ranks.install()
    results, status = {}, 0
    for program in programs:
        options.script, options.args = Path(program["script"]), program["args"]
        if ranks is not None:
            ranks.calls.clear()
            ranks.mistakes.clear()
        current.append(Recorder(options))
        error, status = execute(program)
        current[-1].close()
        results[program["name"]] = result = summary(options, current[-1], ranks, status, error)
        result["steps_found"] = options.steps in patches.applied
        show(result, options)
    if options.json:
        options.json.write_text(json.dumps(results if options.programs else result, indent=1))
    return status


def execute(program: dict[str, Any]) -> tuple[str | None, int]:
    """Run a program as __main__ in its folder; return its error, if any, and its exit status."""
    os.chdir(program["folder"])
    sys.argv = [program["script"], *program["args"]]
    sys.path[0] = str(Path(program["script"]).parent)
    try:
        runpy.run_path(program["script"], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
        return None, end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as fault:  # noqa: BLE001 - whatever ends the script is part of the result
        traceback.print_exc()
        return f"{type(fault).__name__}: {fault}", 1
    return None, 0


def summary(options: argparse.Namespace, recorder: Recorder, ranks: Any, status: int,
            error: str | None) -> dict[str, Any]:
    """The result as plain values; per step means over the steps after the warm-up."""
    steps = recorder.steps[options.warmup:]
    names = ["launches", *FIELDS]
    per = max(1, len(steps))

    def listed(counter: collections.Counter) -> list[dict[str, Any]]:
        return [{"where": where, "per_step": round(count / per, 2)} for where, count in counter.most_common()]

    torch = sys.modules["torch"]
    result: dict[str, Any] = {
        "script": os.path.relpath(options.script, options.root), "args": options.args, "status": status, "error": error,
        "torch": torch.__version__, "gpus": options.gpus, "ranks": options.ranks, "steps": len(recorder.steps),
        "counted_steps": len(steps), "whole_run": recorder.snapshot(),
        "per_step": {name: {"median": statistics.median(step[name] for step in steps),
                            "min": min(step[name] for step in steps), "max": max(step[name] for step in steps)}
                     for name in names} if steps else {},
        "each_step": recorder.steps, "waits": listed(recorder.lines[WAIT]),
        "pageable_copies": listed(recorder.lines[PAGEABLE]),
        "peak_allocated": recorder.peak, "peak_reserved": {gpu: recorder.library.null_peak(gpu)
                                                           for gpu in range(options.gpus)}}
    if options.launches_by_line or options.kernels:
        files: collections.Counter = collections.Counter()
        for where, count in recorder.lines[LAUNCH].items():
            files[where.split(":")[0]] += count
        result["launches_by_file"] = listed(files)
        result["launches_by_line"] = listed(recorder.lines[LAUNCH])
        common = recorder.kernels.most_common()
        result["kernels"] = [{"kernel": name, "per_step": round(count / per, 2)}
                             for name, (_, count) in zip(readable([name for name, _ in common]), common, strict=True)]
    if ranks is not None:
        result["collectives"] = [{"name": name, "type": kind, "shape": shape, "where": where, "calls": count}
                                 for (name, kind, shape, where), count in ranks.calls.most_common()]
        result["mistakes"] = [{"name": name, "mistake": mistake, "where": where, "calls": count}
                              for (name, mistake, where), count in ranks.mistakes.most_common()]
    return result


def readable(names: list[bytes]) -> list[str]:
    """C++ names as they are written, where c++filt is there."""
    with contextlib.suppress(OSError):
        clean = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        names = subprocess.run(["c++filt"], input=b"\n".join(names), capture_output=True, env=clean).stdout.splitlines()
    return [re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name.decode()) for name in names]


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result as tables."""
    def table(title: str, rows: list[tuple[Any, str]]) -> None:
        print(f"\n{title}" + ("" if rows else ": none"))
        for count, text in rows[:options.lines]:
            print(f"{count:>10}  {text[:200]}")
        if len(rows) > options.lines:
            print(f"{'':>10}  and {len(rows) - options.lines} more")

    def by_line(name: str) -> list[tuple[Any, str]]:
        return [(row["per_step"], row["where"]) for row in result[name]]

    print(f"\n== null GPU: {result['script']} ended with status {result['status']}"
          + (f" ({result['error'].splitlines()[0][:300]})" if result["error"] else ""))
    if result["per_step"]:
        print(f"{result['counted_steps']} of {result['steps']} steps counted\n"
              f"{'median':>10}{'min':>10}{'max':>10}  a step")
        for name, label in ROWS:
            row = result["per_step"][name]
            print(f"{row['median']:>10g}{row['min']:>10}{row['max']:>10}  {label}")
        table("Waits, by line, a step", by_line("waits"))
        table("Copies that may hold up the host, by line, a step", by_line("pageable_copies"))
        if options.launches_by_line:
            table("Launches, by file, a step", by_line("launches_by_file"))
            table("Launches, by line, a step", by_line("launches_by_line"))
        if options.kernels:
            table("Kernels, a step", [(row["per_step"], row["kernel"]) for row in result["kernels"]])
    else:
        print(f"no step beyond the warm-up was seen ({options.steps}"
              + ("" if result["steps_found"] else ", which was not imported") + "); the whole run:")
        for name, label in ROWS[1:]:
            print(f"{result['whole_run'][name]:>10}  {label.strip()}")
    if "collectives" in result:
        table("Collectives, the whole run", [
            (row["calls"], f"{row['name']} {row['type']} {row['shape']}  {row['where']}")
            for row in result["collectives"]])
        table("Mistakes in collectives", [
            (row["calls"], f"{row['name']}: {row['mistake']}  {row['where']}") for row in result["mistakes"]])
    print("\nPeak memory, MiB: " + ", ".join(
        f"GPU {gpu} {peak / 2 ** 20:.1f} in tensors, {result['peak_reserved'][gpu] / 2 ** 20:.1f} taken"
        for gpu, peak in result["peak_allocated"].items()) if result["peak_allocated"] else "\nNo GPU memory was used.")
    sys.stdout.flush()


HERE = str(Path(__file__).resolve().parent) + os.sep

if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    if "NULLGPU" not in os.environ:
        enter(chosen)
    sys.exit(run(chosen))
