"""Train a diffusion model of "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364).

    python train.py --outdir=training-runs --data=datasets/cifar10-32x32.zip --cond=1 --arch=ddpmpp
    torchrun --standalone --nproc_per_node=4 train.py --outdir=training-runs --data=... --cond=1 --arch=ddpmpp

The same command again continues a run that was interrupted.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import click

from shared.cli import UserError, run_main

if TYPE_CHECKING:
    from EDM.dataset import TrainingSet

MILLION = "million images"
COMPLETE = "complete"


class IntList(click.ParamType):
    """Comma-separated integers and inclusive ranges: 1,2,5-10."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        from EDM.options import parse_int_list

        try:
            return value if isinstance(value, list) else parse_int_list(value)
        except ValueError:
            self.fail(f"{value!r} is not a list like 1,2,5-10", param, ctx)


def option(name: str, **settings: Any) -> Any:
    return click.option(name, **{"show_default": settings.get("default") is not None, **settings})


POSITIVE = click.FloatRange(min=0, min_open=True)
AT_LEAST_ONE = click.IntRange(min=1)
SHARE = click.FloatRange(min=0, max=1)


@click.command(help=__doc__.split("\n\n    python")[0].strip())
# Main options.
@option("--outdir", metavar="DIR", type=str, required=True, help="Where to save the runs")
@option("--data", metavar="ZIP|DIR", type=str, required=True, help="Path to the training set")
@option("--cond", metavar="BOOL", type=bool, default=False, help="Train a class-conditional model")
@option("--arch", type=click.Choice(["ddpmpp", "ncsnpp", "adm"]), default="ddpmpp", help="Network architecture")
@option("--precond", type=click.Choice(["vp", "ve", "edm"]), default="edm", help="Preconditioning and loss")
# Hyperparameters.
@option("--duration", type=POSITIVE, default=200, help=f"Training duration, {MILLION}")
@option("--batch", type=AT_LEAST_ONE, default=512, help="Total batch size")
@option("--batch-gpu", type=AT_LEAST_ONE, help="Most images per GPU at once; the rest is accumulated")
@option("--cbase", type=AT_LEAST_ONE, help="Channel multiplier  [default: varies]")
@option("--cres", type=IntList(), help="Channels per resolution  [default: varies]")
@option("--lr", type=POSITIVE, default=1e-3, help="Learning rate")
@option("--ema", type=click.FloatRange(min=0), default=0.5, help=f"EMA half-life, {MILLION}")
@option("--dropout", type=SHARE, default=0.13, help="Dropout probability")
@option("--augment", type=SHARE, default=0.12, help="Augmentation probability")
@option("--xflip", metavar="BOOL", type=bool, default=False, help="Double the set by mirrored copies")
# Performance.
@option("--fp16", metavar="BOOL", type=bool, default=False, help="Run the network in fp16 (GPU)")
@option("--ls", type=POSITIVE, default=1, help="Loss scaling")
@option("--bench", metavar="BOOL", type=bool, default=True, help="Let cuDNN benchmark its algorithms")
@option("--cache", metavar="BOOL", type=bool, default=True, help="Accepted; images are always decoded once and cached")
@option("--workers", type=AT_LEAST_ONE, default=1, help="Accepted; batches need no loading processes")
# Files and status.
@option("--desc", metavar="STR", type=str, help="Suffix of the run's folder")
@option("--nosubdir", is_flag=True, help="Use --outdir itself as the run's folder")
@option("--tick", type=AT_LEAST_ONE, default=50, help="Status interval, thousand images")
@option("--snap", type=AT_LEAST_ONE, default=50, help="Ticks between network snapshots")
@option("--dump", type=AT_LEAST_ONE, default=500, help="Ticks between training states")
@option("--seed", type=click.IntRange(min=0, max=2**32 - 1), help="Random seed  [default: random]")
@option("--transfer", metavar="PKL|URL", type=str, help="Start from the weights of a snapshot")
@option("--resume", metavar="PT", type=str, help="Go on from a former run's training-state-*.pt")
@click.option("-n", "--dry-run", is_flag=True, help="Print the options and exit")
# Beyond the published command line; neutral unless given.
@option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
        help="Arithmetic of the network  [default: bf16 on a GPU that has it, else fp32; --fp16 overrules]")
@option("--strict", is_flag=True, help="The published arithmetic: fp32 and no fast path")
@option("--compile", metavar="BOOL", type=bool, help="Compile the network  [default: no]")
@option("--device", metavar="NAME", type=str, help="cpu, cuda, cuda:N or mps  [default: a GPU if there is one]")
@option("--checkpoint-seconds", type=POSITIVE, default=600, help="Time between two checkpoints")
@option("--lr-rampup", type=click.FloatRange(min=0), help="Warm-up of the learning rate, thousand images  [10000]")
@option("--lr-decay", type=SHARE, help="Share of the run over which the learning rate falls to 0 at its end  [0]")
@option("--ema-rampup", type=POSITIVE, help="EMA half-life at most this share of the images seen  [0.05]")
@option("--ema-sigma-rel", type=click.FloatRange(min=0, min_open=True, max=0.2886),
        help="Power-law EMA of this relative width instead of --ema, as in EDM2 (e.g. 0.1)")
@option("--num-blocks", type=AT_LEAST_ONE, help="Residual blocks per resolution  [4; adm 3]")
@option("--attn-resolutions", type=IntList(), help="Resolutions with attention  [16; adm 32,16,8]")
@option("--channel-mult-emb", type=AT_LEAST_ONE, help="Width of the embedding, times --cbase  [4]")
@option("--label-dropout", type=SHARE, help="Share of images trained without class, for generate.py --guidance  [0]")
@option("--sigma-data", type=POSITIVE, help="Standard deviation of the data (--precond=edm)  [0.5]")
@option("--p-mean", type=float, help="Mean of ln(sigma) in training (--precond=edm)  [-1.2]")
@option("--p-std", type=POSITIVE, help="Standard deviation of ln(sigma) in training (--precond=edm)  [1.2]")
@click.pass_context
def main(context: click.Context, **given: Any) -> None:
    flags = SimpleNamespace(**given)
    check(flags)
    if flags.precision == "fp16":
        flags.fp16, flags.precision = True, None
    # --fp16=0 in so many words asks for fp32, where saying nothing leaves the choice to the device.
    says_fp16 = context.get_parameter_source("fp16").name != "DEFAULT"
    flags.arithmetic = flags.precision or ("fp16" if flags.fp16 else "fp32" if says_fp16 else None)
    if flags.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            world_size = int(os.environ.get("WORLD_SIZE", 1))
            options, _, _ = plan(flags, world_size)
            print_options(options, flags, world_size)
            print("Dry run; exiting.")
        return
    launch(flags)


def check(flags: SimpleNamespace) -> None:
    """Raise UserError for flags that contradict each other."""
    if flags.transfer is not None and flags.resume is not None:
        raise UserError("--transfer and --resume cannot be specified at the same time")
    if flags.transfer is not None and not re.match(r"https?://", flags.transfer) and not flags.dry_run \
            and not os.path.isfile(flags.transfer):
        raise UserError(f"--transfer: no such file: {flags.transfer}")
    if flags.precision not in (None, "fp16") and flags.fp16:
        raise UserError(f"--fp16=1 and --precision={flags.precision} contradict each other; give one of them")
    if flags.ema_sigma_rel is not None and flags.ema_rampup is not None:
        raise UserError("--ema-rampup belongs to the half-life of --ema; leave it out with --ema-sigma-rel")
    if flags.label_dropout and not flags.cond:
        raise UserError("--label-dropout needs a class-conditional model: add --cond=1")
    if flags.strict and flags.compile:
        raise UserError("--strict and --compile=1 contradict each other; give one of them")


def plan(flags: SimpleNamespace, world_size: int) -> tuple[dict[str, Any], str | None, TrainingSet]:
    """Return the option dictionary with the run's folder, a line if a run is taken up again, and the training set."""
    import secrets

    from EDM.options import choose_folder, option_dictionary

    dataset = open_data(flags.data, flags.cond, flags.xflip)
    seed = secrets.randbelow(1 << 31) if flags.seed is None else flags.seed
    options = option_dictionary(flags, dataset.resolution, len(dataset), seed)
    options["run_dir"], continued = choose_folder(flags, options, world_size)
    return options, continued, dataset


def open_data(path: str, use_labels: bool, xflip: bool) -> TrainingSet:
    """Open the training set; raise UserError if it cannot be read or has none of the labels that are needed."""
    from EDM.dataset import open_training_set

    try:
        dataset = open_training_set(path, use_labels=use_labels, xflip=xflip)
    except (OSError, UserError) as error:
        message = str(error)
        raise UserError(message if message.startswith("--data") else f"--data: {message}") from None
    if use_labels and not dataset.label_dim:
        raise UserError("--cond=True requires labels specified in dataset.json; "
                        f"{path} has none: add them, or train with --cond=0")
    return dataset


def print_options(options: dict[str, Any], flags: SimpleNamespace, world_size: int) -> None:
    from EDM.options import summary

    print("\nTraining options:")
    print(json.dumps(options, indent=2))
    print("\n" + "\n".join(summary(options, flags, world_size)) + "\n", flush=True)


def launch(flags: SimpleNamespace) -> None:
    """Agree with the other processes on what to do, prepare the folder, and train."""
    from EDM.options import batch_rounds

    world_size, dataset, agreed = int(os.environ.get("WORLD_SIZE", 1)), None, None
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            batch_rounds(flags.batch, flags.batch_gpu, world_size)
            options, continued, dataset = plan(flags, world_size)
        except UserError as error:
            agreed = error
    if isinstance(agreed, UserError) and world_size == 1:
        raise agreed  # before torch is imported

    from shared import distributed

    world = distributed.start(flags.device)
    held = None
    if world.main and agreed is None:
        try:
            agreed, held = prepare(options, continued, flags, world_size)
        except UserError as error:
            agreed = error
    agreed = distributed.broadcast_value(agreed, world)
    if isinstance(agreed, UserError):
        distributed.stop()
        if world.main:
            raise agreed
        sys.exit(agreed.status)
    if agreed != COMPLETE:
        from EDM.training import train

        if dataset is None:  # rank 0 has decoded it by now
            dataset = open_data(flags.data, flags.cond, flags.xflip)
        with held or contextlib.nullcontext():
            train(agreed, dataset, world, precision=flags.arithmetic, strict=flags.strict,
                  compiled=bool(flags.compile), checkpoint_seconds=flags.checkpoint_seconds)
    distributed.stop()


def prepare(options: dict[str, Any], continued: str | None, flags: SimpleNamespace,
            world_size: int) -> tuple[dict[str, Any] | str, IO | None]:
    """Make the run's folder; return the options (COMPLETE where nothing is left to do) and the lock on the folder."""
    from EDM.options import is_finished, lock, write_options
    from shared.files import make_dir

    folder = options["run_dir"]
    if is_finished(folder):
        print(f"{folder} is already complete: see {os.path.join(folder, 'network-snapshot-latest.pkl')}")
        return COMPLETE, None
    print_options(options, flags, world_size)
    print(continued or "Creating output directory...", flush=True)
    make_dir(folder)
    held = lock(folder)
    if held is None:
        raise UserError(f"{folder} is being written to by another process")
    write_options(folder, options)
    return options, held


if __name__ == "__main__":
    run_main(main)
