"""What makes a training run this run: the option dictionary in its folder, the folder's name, its inputs."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared.cli import UserError
from shared.training.files import LOCK, atomic, in_use, lock, move_aside

OPTIONS_FILE = "training_options.json"
RESULT_FILE = "result.json"
INPUTS = "inputs"  # key of OPTIONS_FILE: name of a flag -> fingerprint of the content it names
# Paths of inputs, whose content counts instead.
PATHS = ("dataset_kwargs.path", "resume_pkl", "resume_state_dump", "eval_data")
# How a run is carried out, as opposed to what it computes: may differ between the parts of an interrupted run.
FREE_KEYS = ("run_dir", "data_loader_kwargs", "batch_gpu", "cudnn_benchmark", "compile", "cls", "pairs_gpu")
FREE_IN_RUN = tuple({key.split(".")[0] for key in (*FREE_KEYS, *PATHS)})  # the launcher has compared what they hold


def run_description(flags: SimpleNamespace, gpus: int | str) -> str:
    """Return the run's name without its number: data set, conditioning, network, loss, GPUs, batch, precision."""
    name = os.path.splitext(os.path.basename(flags.data))[0]
    parts = [name, "cond" if flags.cond else "uncond", getattr(flags, "arch_name", flags.arch), flags.precond,
             f"gpus{gpus}", f"batch{flags.batch}", "fp16" if flags.fp16 else "fp32"]
    return "-".join(parts + ([flags.desc] if flags.desc is not None else []))


def choose_folder(flags: SimpleNamespace, options: dict[str, Any], inputs: Mapping[str, str], world_size: int
                  ) -> tuple[str, str | None]:
    """Return the run's folder and, when an earlier run in it is taken up again, a line that says so.

    inputs: fingerprints of what the run reads. With --nosubdir the folder is --outdir itself; a run with other options
    or inputs in there raises UserError. Otherwise it is the newest numbered folder of a run with this description,
    these options and inputs (the number of GPUs aside), finished or not, which no process works in; else it has a new
    number: 1 + the largest one. A run taken up again without --seed keeps the seed it was started with:
    `options["seed"]` is set to it.
    """
    if flags.nosubdir:
        return flags.outdir, _continue_in(flags, options, inputs)
    runs = _numbered_runs(flags.outdir)
    same = re.compile(r"\d+-" + re.escape(run_description(flags, "GPUS")).replace("gpusGPUS", r"gpus\d+"))
    for folder in (os.path.join(flags.outdir, name) for _, name in reversed(runs) if same.fullmatch(name)):
        former = read_options(folder)
        if (former is not None and (Path(folder) / LOCK).exists()  # the original writes none
                and not differences(former, options, inputs, flags.seed is None) and not in_use(folder)):
            options["seed"] = former["seed"]
            return folder, None if is_finished(folder) else f"Continuing the unfinished run {folder}"
    number = runs[-1][0] + 1 if runs else 0
    return os.path.join(flags.outdir, f"{number:05d}-{run_description(flags, world_size)}"), None


def _numbered_runs(outdir: str) -> list[tuple[int, str]]:
    """Return (number, folder name) of the folders in `outdir` whose name starts with a decimal number, by number."""
    if not os.path.isdir(outdir):
        return []
    return sorted((int(match[0]), entry.name) for entry in os.scandir(outdir)
                  if entry.is_dir() and (match := re.match(r"\d+", entry.name)))


def _continue_in(flags: SimpleNamespace, options: dict[str, Any], inputs: Mapping[str, str]) -> str | None:
    folder = Path(flags.outdir)
    former = read_options(folder)
    if former is None:
        return None
    changed = differences(former, options, inputs, flags.seed is None)
    if changed:
        if not any(folder.glob("checkpoint.pt*")) and not any(folder.glob("network-snapshot-*")):
            return None  # it ended before its first step
        reason = f"a run with other options ({'; '.join(changed[:3])})"
        if not flags.overwrite:
            raise UserError(f"{folder} holds {reason}; give the options it was started with, another --outdir, or "
                            "--overwrite to move it aside and start anew")
        if flags.dry_run:
            return f"{folder} holds {reason}, which would be moved aside"
        with lock(folder):  # not while it is still going on
            return f"{folder} held {reason}: moved to {move_aside(folder)}"
    if in_use(folder):
        raise UserError(f"{folder} is being written to by a running process; wait for it, or choose another --outdir")
    options["seed"] = former["seed"]
    return f"Continuing the run in {folder}"


def read_options(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return the option dictionary of the run in `folder`, or None."""
    try:
        options = json.loads((Path(folder) / OPTIONS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise UserError(f"{folder}/{OPTIONS_FILE} is not JSON; remove it or choose another --outdir") from None
    return options if isinstance(options, dict) and "seed" in options else None


def write_options(folder: str | os.PathLike, options: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    with atomic(Path(folder) / OPTIONS_FILE, "w") as file:
        file.write(json.dumps({**options, INPUTS: inputs}, indent=2))


def differences(former: Mapping[str, Any], options: Mapping[str, Any], inputs: Mapping[str, str],
                ignore_seed: bool) -> list[str]:
    """Return, as "key: old there, new here", what makes a run of `options` and `inputs` another than `former`."""
    # Older versions recorded no fingerprints: then the paths count.
    ignored = {*FREE_KEYS, *(PATHS if INPUTS in former else (INPUTS,)), *(("seed",) if ignore_seed else ())}

    def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
        leaves = {}
        for key, value in tree.items():
            leaves.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
        return {key: value for key, value in leaves.items() if not {key, key.split(".")[0]} & ignored}

    old, new = flat(former), flat(json.loads(json.dumps({**options, INPUTS: inputs})))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"another content of {key.removeprefix(f'{INPUTS}.')}" if key.startswith(f"{INPUTS}.") else
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in changed]


def is_finished(folder: str | os.PathLike) -> bool:
    return (Path(folder) / RESULT_FILE).is_file()


def batch_rounds(batch: int, batch_gpu: int | None, world_size: int) -> tuple[int, int]:
    """Return (images per forward of one process, accumulation rounds); their product times `world_size` is `batch`.

    Raises UserError when `batch` cannot be divided evenly.
    """
    per_rank, rest = divmod(batch, world_size)
    if rest or not per_rank:
        raise UserError(f"--batch={batch} cannot be shared evenly by {world_size} processes; "
                        f"choose a multiple of {world_size}")
    part = min(batch_gpu or per_rank, per_rank)
    if per_rank % part:
        raise UserError(f"--batch-gpu={batch_gpu} does not divide the {per_rank} images of each of the {world_size} "
                        "process(es); choose a divisor of it")
    return part, per_rank // part
