"""The flags that the training scripts share, in the published form; neutral beyond it unless given."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

MILLION = "million images"
POSITIVE = click.FloatRange(min=0, min_open=True)
AT_LEAST_ONE = click.IntRange(min=1)
SHARE = click.FloatRange(min=0, max=1)
Option = Callable[[Any], Any]


class IntList(click.ParamType):
    """Comma-separated integers and inclusive ranges: 1,2,5-10."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        from EDM.training.config import parse_int_list

        try:
            return value if isinstance(value, list) else parse_int_list(value)
        except ValueError:
            self.fail(f"{value!r} is not a list like 1,2,5-10", param, ctx)


class ArchChoice(click.Choice):
    """The published architectures, and `further` ones: messages list the published ones, in the published words."""

    def __init__(self, choices: Sequence[str], further: Sequence[str] = ()) -> None:
        super().__init__(choices)
        self.further = tuple(further)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if value in self.further else super().convert(value, param, ctx)


def option(*names: str, **settings: Any) -> Option:
    return click.option(*names, **{"show_default": settings.get("default") is not None, **settings})


def with_options(*groups: Sequence[Option]) -> Callable[[Any], Any]:
    """Return a decorator that gives a command the options of all groups, in this order."""
    def decorate(function: Any) -> Any:
        for add in reversed([add for group in groups for add in group]):
            function = add(function)
        return function

    return decorate


def main_options(archs: click.Choice, preconds: Sequence[str], cond_help: str) -> list[Option]:
    return [
        option("--outdir", metavar="DIR", type=str, required=True, help="Where to save the runs"),
        option("--data", metavar="ZIP|DIR", type=str, required=True, help="Path to the training set"),
        option("--cond", metavar="BOOL", type=bool, default=False, help=cond_help),
        option("--arch", type=archs, default="ddpmpp", help="Network architecture"
               + "".join(f", or {name}" for name in getattr(archs, "further", ()))),
        option("--precond", type=click.Choice(preconds), default="edm", help="Preconditioning and loss")]


HYPERPARAMETERS = [
    option("--duration", type=POSITIVE, default=200, help=f"Training duration, {MILLION}"),
    option("--batch", type=AT_LEAST_ONE, default=512, help="Total batch size"),
    option("--batch-gpu", type=AT_LEAST_ONE, help="Most images per GPU at once; the rest is accumulated"),
    option("--cbase", type=AT_LEAST_ONE, help="Channel multiplier  [default: varies]"),
    option("--cres", type=IntList(), help="Channels per resolution  [default: varies]"),
    option("--lr", type=POSITIVE, default=1e-3, help="Learning rate"),
    option("--ema", type=click.FloatRange(min=0), default=0.5, help=f"EMA half-life, {MILLION}"),
    option("--dropout", type=SHARE, default=0.13, help="Dropout probability"),
    option("--augment", type=SHARE, default=0.12, help="Augmentation probability"),
    option("--xflip", metavar="BOOL", type=bool, default=False, help="Double the set by mirrored copies")]

PERFORMANCE = [
    option("--fp16", metavar="BOOL", type=bool, default=False, help="Run the network in fp16 (GPU)"),
    option("--ls", type=POSITIVE, default=1, help="Loss scaling"),
    option("--bench", metavar="BOOL", type=bool, default=True, help="Let cuDNN benchmark its algorithms"),
    option("--cache", metavar="BOOL", type=bool, default=True,
           help="Accepted; images are always decoded once and cached"),
    option("--workers", type=AT_LEAST_ONE, default=1, help="Accepted; batches need no loading processes")]

FILES = [
    option("--desc", metavar="STR", type=str, help="Suffix of the run's folder"),
    option("--nosubdir", is_flag=True, help="Use --outdir itself as the run's folder"),
    option("--tick", type=AT_LEAST_ONE, default=50, help="Status interval, thousand images"),
    option("--snap", type=AT_LEAST_ONE, default=50, help="Ticks between network snapshots"),
    option("--dump", type=AT_LEAST_ONE, default=500, help="Ticks between training states"),
    option("--seed", type=click.IntRange(min=0, max=2**32 - 1), help="Random seed  [default: random]"),
    option("--transfer", metavar="PKL|URL", type=str, help="Start from the weights of a snapshot"),
    option("--resume", metavar="PT", type=str, help="Go on from a former run's training-state-*.pt"),
    click.option("-n", "--dry-run", is_flag=True, help="Print the options and exit")]

LABEL_NOISE = [
    option("--noise_type", type=click.Choice(["clean", "sym", "asym", "learn", "file"]),
           help="Kind of label noise  [default: see --help above]"),
    option("--noise_rate", type=float, metavar="FLOAT", help="Share of wrong labels, from 0 to below 1"),
    option("--transition", metavar="FILE", type=str,
           help="Transition matrix as .npy or .json, row = clean class (--noise_type=file)"),
    option("--dataset", type=click.Choice(["mnist", "cifar10", "cifar100", "digits"]),
           help="Which set --data is  [default: by its name]")]

# Beyond the published command line.
RUNNING = [
    option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
           help="Arithmetic of the network  [default: bf16 on a GPU that has it, else fp32; --fp16 overrules]"),
    option("--strict", is_flag=True, help="The published arithmetic: fp32 and no fast path"),
    option("--compile", metavar="BOOL", type=bool, help="Compile the network  [default: no]"),
    option("--device", metavar="NAME", type=str, help="cpu, cuda, cuda:N or mps  [default: a GPU if there is one]"),
    option("--checkpoint-seconds", type=POSITIVE, default=600, help="Time between two checkpoints")]

SCHEDULES = [
    option("--lr-rampup", "--lr_rampup_kimg", "lr_rampup", type=click.FloatRange(min=0),
           help="Warm-up of the learning rate, thousand images  [10000]"),
    option("--lr-decay", type=SHARE, help="Share of the run over which the learning rate falls to 0 at its end  [0]"),
    option("--ema-rampup", type=POSITIVE, help="EMA half-life at most this share of the images seen  [0.05]"),
    option("--ema-sigma-rel", type=click.FloatRange(min=0, min_open=True, max=0.2886),
           help="Power-law EMA of this relative width instead of --ema, as in EDM2 (e.g. 0.1)")]

UNET = [
    option("--num-blocks", type=AT_LEAST_ONE, help="Residual blocks per resolution  [4; adm 3]"),
    option("--attn-resolutions", type=IntList(), help="Resolutions with attention  [16; adm 32,16,8]"),
    option("--channel-mult-emb", type=AT_LEAST_ONE, help="Width of the embedding, times --cbase  [4]"),
    option("--label-dropout", type=SHARE,
           help="Share of images trained without class, for generate.py --guidance  [0]")]

LEVELS = [
    option("--sigma-data", type=POSITIVE, help="Standard deviation of the data (--precond=edm)  [0.5]"),
    option("--p-mean", type=float, help="Mean of ln(sigma) in training (--precond=edm)  [-1.2]"),
    option("--p-std", type=POSITIVE, help="Standard deviation of ln(sigma) in training (--precond=edm)  [1.2]")]

RESUME_SUB = option("--resume_sub", type=str, hidden=True)  # published, and without effect there too
