"""The flags that the training scripts share, and the identity of a run: the option dictionary in its folder, the
folder's name, its inputs."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared.cli import Bool, Choice, Flag, Float, Int, IntList, Option, UserError
from shared.training.files import LOCK, in_use, lock, move_aside, write_json

OPTIONS_FILE = "training_options.json"
RESULT_FILE = "result.json"
INPUTS = "inputs"  # key of OPTIONS_FILE: name of a flag -> fingerprint of the content it names
# Paths of inputs, whose content counts instead.
PATHS = ("dataset_kwargs.path", "resume_pkl", "resume_state_dump", "eval_data")
# Settings that do not change the numbers: they may differ between the parts of an interrupted run.
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
    write_json(Path(folder) / OPTIONS_FILE, {**options, INPUTS: inputs}, indent=2)


def differences(former: Mapping[str, Any], options: Mapping[str, Any], inputs: Mapping[str, str],
                ignore_seed: bool) -> list[str]:
    """Return the differences of `options` and `inputs` from `former`, as "key: old there, new here"."""
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


# -------------------------------------------------------------------------------------------------------------- flags

COUNT, POSITIVE, FRACTION = Int(1), Float(0, open=True), Float(0, 1)


def main_options(archs: Choice, preconds: Sequence[str], cond_help: str) -> tuple[Option, ...]:
    """Return the flags that every run names. archs, preconds: the script's choices; cond_help: what --cond does."""
    further = "".join(f", or {name}" for name in archs.further)
    return (
        Option("--outdir", required=True, metavar="DIR", help="where to save the runs"),
        Option("--data", required=True, metavar="ZIP|DIR", help="path to the training set"),
        Option("--cond", Bool, False, cond_help),
        Option("--arch", archs, "ddpmpp", f"network architecture{further}"),
        Option("--precond", Choice(*preconds), "edm", "preconditioning and loss"),
    )


HYPERPARAMETERS = (
    Option("--duration", Float(0, 1e9, open="low"), 200.0, "training duration", unit="million images"),
    Option("--batch", COUNT, 512, "total batch size", unit="images"),
    Option("--batch-gpu", COUNT, None, "most images per GPU at once; the rest is accumulated"),
    Option("--cbase", COUNT, None, "channel multiplier", default_help="varies"),
    Option("--cres", IntList(1), None, "channels per resolution", default_help="varies"),
    Option("--lr", POSITIVE, 1e-3, "learning rate"),
    Option("--ema", Float(0, 1e9), 0.5, "EMA half-life", unit="million images"),
    Option("--dropout", FRACTION, 0.13, "dropout probability"),
    Option("--augment", FRACTION, 0.12, "augmentation probability"),
    Option("--xflip", Bool, False, "double the set by mirrored copies"),
)

PERFORMANCE = (
    Option("--fp16", Bool, False, "run the network in fp16 (GPU)"),
    Option("--ls", POSITIVE, 1.0, "loss scaling"),
    Option("--bench", Bool, True, "let cuDNN benchmark its algorithms"),
    Option("--cache", Bool, True, "accepted; images are always decoded once and cached"),
    Option("--workers", COUNT, 1, "accepted; batches need no loading processes"),
)

FILES = (
    Option("--desc", metavar="STR", help="suffix of the run's folder"),
    Option("--nosubdir", Flag, False, "use --outdir itself as the run's folder"),
    Option("--overwrite", Flag, False, "with --nosubdir: move another run in --outdir aside and start anew"),
    Option("--tick", COUNT, 50, "status interval", unit="thousand images"),
    Option("--snap", COUNT, 50, "interval of network snapshots", unit="ticks"),
    Option("--dump", COUNT, 500, "interval of training states", unit="ticks"),
    Option("--seed", Int(0, 2**32 - 1), None, "random seed", default_help="random"),
    Option("--transfer", metavar="PKL|URL", help="start from the weights of a snapshot"),
    Option("--resume", metavar="PT", help="continue from a training-state-*.pt"),
    Option("--resume_sub", hidden=True),  # published, and without effect there too
    Option("-n --dry-run", Flag, False, "print the options and exit"),
)

LABEL_NOISE = (
    Option("--noise_type", Choice("clean", "sym", "asym", "learn", "file"), None,
           "kind of label noise", default_help="see above"),
    Option("--noise_rate", Float(0, 1, open="high"), None, "fraction of wrong labels"),
    Option("--transition", metavar="FILE",
           help="transition matrix as .npy or .json, row = clean class (--noise_type=file)"),
    Option("--dataset", Choice("mnist", "cifar10", "cifar100", "digits"), None,
           "data set of --data", default_help="by its name"),
)

# Beyond the published command line.
RUNNING = (
    Option("--precision", Choice("fp32", "bf16", "fp16"), None,
           "arithmetic of the network", default_help="bf16 on a GPU that has it, else fp32; --fp16 overrules"),
    Option("--strict", Flag, False, "the published arithmetic: fp32 and no fast path"),
    Option("--compile", Bool, None, "compile the network", default_help="on a GPU, unless --strict"),
    Option("--device", metavar="NAME", help="cpu, cuda or cuda:N", default_help="a GPU if available"),
    Option("--checkpoint-seconds", POSITIVE, 600.0, "time between two checkpoints", unit="s"),
)

SCHEDULES = (
    Option("--lr-rampup --lr_rampup_kimg", Float(0), None,
           "warm-up of the learning rate", default_help="10000", unit="thousand images"),
    Option("--lr-decay", FRACTION, None,
           "fraction of the run over which the learning rate falls to 0 at its end", default_help="0"),
    Option("--ema-rampup", POSITIVE, None, "EMA half-life at most this fraction of the images seen",
           default_help="0.05"),
    Option("--ema-sigma-rel", Float(0, 0.2886, open="low"), None,
           "power-law EMA of this relative width instead of --ema, as in EDM2 (e.g. 0.1)"),
)

UNET = (
    Option("--num-blocks", COUNT, None, "residual blocks per resolution", default_help="4; adm 3"),
    Option("--attn-resolutions", IntList(1), None, "resolutions with attention", default_help="16; adm 32,16,8"),
    Option("--channel-mult-emb", COUNT, None, "width of the embedding, times --cbase", default_help="4"),
    Option("--label-dropout", FRACTION, None,
           "fraction of images trained without class, for generate.py --guidance", default_help="0"),
)

LEVELS = (
    Option("--sigma-data", POSITIVE, None, "standard deviation of the data (--precond=edm)", default_help="0.5"),
    Option("--p-mean", Float(), None, "mean of ln(sigma) in training (--precond=edm)", default_help="-1.2"),
    Option("--p-std", POSITIVE, None, "standard deviation of ln(sigma) in training (--precond=edm)",
           default_help="1.2"),
)
