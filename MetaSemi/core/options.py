"""The command lines of train_meta.py and train_baseline.py: the published flags with their defaults, then ours.

Nothing heavy is imported here, so that `--help` answers at once.
"""
from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from shared.cli import Parser, UserError
from shared.flag_types import number

DATASETS = {"cifar10": 10, "cifar100": 100, "svhn": 10, "digits": 10}
ARCHITECTURES = ("convlarge", "shakeshake", "small")
COUNT, WHOLE = number(int, 1), number(int, 0)
NONNEGATIVE, SHARE, ABOVE_ZERO = number(float, 0), number(float, 0, 1), number(float, 1e-12)

# What may differ between a command and the run that it continues: nothing here changes the numbers.
NOT_THE_METHOD = frozenset({"data_path", "download", "num_workers", "resume", "print_freq", "save_path", "gpu",
                            "overwrite", "start_step"})


def milestones(text: str) -> tuple[int, ...]:
    """Read "[300000, 350000]" or "300000,350000"."""
    try:
        value = ast.literal_eval(text.strip() or "[]")
    except (ValueError, SyntaxError):
        value = None
    steps = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(step) is int and step >= 0 for step in steps):
        raise argparse.ArgumentTypeError(f"expected steps such as [300000, 350000], got {text!r}")
    return steps


def parse(description: str, meta: bool, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of train_meta.py (meta) or train_baseline.py; raise UserError for what does not fit.

    The result also has `num_classes`, and `method`: the options that decide the numbers, as plain values.
    """
    parser = Parser(description=description.strip().split("\n\n")[0], allow_abbrev=False)
    add_published(parser, meta)
    add_ours(parser, meta)
    options = parser.parse_args(argv)
    options.num_classes = DATASETS[options.dataset]
    check(options)
    options.method = {"script": "train_meta" if meta else "train_baseline",
                      **{key: value for key, value in sorted(vars(options).items()) if key not in NOT_THE_METHOD}}
    return options


def add_published(parser: Parser, meta: bool) -> None:
    def add(*names: str, kind: Any = None, default: Any = None, text: str = "", **more: Any) -> None:
        shown = "" if default is None else f" [{list(default) if isinstance(default, tuple) else default}]"
        group.add_argument(*names, default=default, help=text + shown,
                           **({"type": kind, "metavar": ""} if kind else {}), **more)

    group = parser.add_argument_group("data and network")
    add("--dataset", default="cifar10", choices=tuple(DATASETS), text="digits: 1,797 handwritten digits, no files "
        "needed")
    add("--data-path", kind=str, default="./data", text="folder of the data sets")
    add("--num-label", kind=COUNT, default=4000, text="labelled images in all, equally many of every class")
    add("-a", "--architecture", default="convlarge", choices=ARCHITECTURES, text="small: for the digits")
    group = parser.add_argument_group("method")
    group.add_argument("--mix-up", action="store_true", help="mix labelled with unlabelled images, in place of the "
                       "labelled loss")
    add("--alpha", kind=ABOVE_ZERO, default=1.0, text="mix-up coefficients are drawn from Beta(alpha, alpha)")
    if meta:
        add("--weight", kind=NONNEGATIVE, default=1.0, text="final weight of the unlabelled loss")
        add("--epsilon", kind=ABOVE_ZERO, default=1e-2, text="L2 norm of the perturbation of the weights")
    group = parser.add_argument_group("optimisation")
    add("--total-steps", kind=COUNT, default=400000, text="end of the training")
    add("--start-step", kind=WHOLE, default=0, text="first step of a new run")
    add("--batch-size", kind=COUNT, default=128, text="labelled images in a batch of all processes, and as many "
        "unlabelled ones")
    add("--lr", kind=NONNEGATIVE, default=0.1, text="highest learning rate" + (", and meta-rate" if meta else ""))
    add("--warmup", kind=WHOLE, default=4000, text="steps over which the learning rate" +
        (" and the unlabelled weight rise" if meta else " rises"))
    add("--gamma", kind=NONNEGATIVE, default=0.1, text="factor on the learning rate behind each milestone")
    add("--milestones", kind=milestones, default=(300000, 350000), text="steps of these decays")
    add("--weight-decay", kind=NONNEGATIVE, default=1e-4, text="on all parameters")
    add("--momentum", kind=SHARE, default=0.9, text="of SGD")
    group = parser.add_argument_group("running")
    add("--num-workers", kind=WHOLE, default=4, text="accepted; images are prepared on the device, in whole batches")
    add("--resume", kind=str, text="checkpoint to continue (the same command again continues without it)")
    add("--seed", kind=number(int, 0, 2 ** 63 - 1), default=1234, text="of the labelled split, weights and all draws")
    add("--print-freq", kind=COUNT, default=100, text="steps between lines of the log")
    add("--test-freq", kind=COUNT, default=400, text="steps between evaluations, each followed by a checkpoint")
    add("--save-path", kind=str, default="./results/tmp", text="folder of the run")
    group.add_argument("--gpu", action="store_true", help="use a GPU (each process its own); without it the CPU")


def add_ours(parser: Parser, meta: bool) -> None:
    group = parser.add_argument_group("beyond the published flags")
    if meta:
        group.add_argument("--meta-grad", choices=("finite", "exact"), default="finite", help="finite difference, or "
                           "exactly by forward-mode differentiation [finite]")
        group.add_argument("--local-meta", action="store_true", help="with several processes: each takes the gradient "
                           "of its own labelled images (default: of the whole batch)")
        group.add_argument("--meta-lr", type=NONNEGATIVE, default=1.0, metavar="", help="factor on the meta-rate [1.0]")
        group.add_argument("--eval-gate", choices=("random", "half"), default="random", help="Shake-Shake gate in the "
                           "gradient of evaluation mode [random]")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="auto: bf16 on GPUs that have it, else fp32")
    group.add_argument("--strict", action="store_true", help="the paper's arithmetic: fp32 without TF32, deterministic "
                       "kernels, nothing fused")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--download", action="store_true", help="fetch missing files of the data set")
    group.add_argument("--overwrite", action="store_true", help="start anew where the folder holds a run with other "
                       "settings (without it: an error)")


def check(options: argparse.Namespace) -> None:
    """Refuse combinations that no single flag shows; UserError."""
    per_class = options.num_label // options.num_classes
    if not per_class:
        raise UserError(f"--num-label {options.num_label}: {options.dataset} has {options.num_classes} classes, give "
                        f"at least {options.num_classes}")
    if options.start_step >= options.total_steps:
        raise UserError(f"--start-step {options.start_step} must be less than --total-steps {options.total_steps}")
    if options.dataset == "digits" and options.architecture != "small":
        raise UserError(f"-a {options.architecture} is for images of 32x32, the digits are 8x8: give -a small")
    if options.architecture == "small" and options.dataset != "digits":
        raise UserError(f"-a small is for the digits; give -a convlarge or -a shakeshake for {options.dataset}")
    if options.precision == "bf16" and options.strict:
        raise UserError("--strict is fp32; leave out --precision bf16")
