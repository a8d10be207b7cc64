"""The command line that all TorchSSL trainers share: published flags with their published defaults, then ours.

An algorithm adds the flags of its own loss. The command line beats the YAML file of `--c`, which beats the defaults.
Nothing heavy is imported here, so that `--help` answers at once.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from shared.cli import Parser, UserError, parse_bool
from shared.flag_types import number


class Flag(NamedTuple):
    """One option: `names` as typed (the first long one gives the key in YAML files)."""

    names: str
    type: Callable[[str], Any] | tuple[str, ...] | None  # a tuple: one of these words; None: a switch
    default: Any
    help: str


COUNT, WHOLE = number(int, 1), number(int, 0)
POSITIVE, SHARE = number(float, 0), number(float, 0, 1)
TEMPERATURE = number(float, 1e-3)  # what is divided by


def epoch_count(text: str) -> int:
    """Read --epoch: only 1 has a meaning, since one epoch is the whole run."""
    if text.strip() != "1":
        raise argparse.ArgumentTypeError(f"expected 1 (an epoch is a whole run; see --num_train_iter), got {text!r}")
    return 1


epoch_count.__name__ = "1"

COMMON = {
    "output": (
        Flag("--save_dir", str, "./saved_models", "folder of all runs"),
        Flag("--save_name -sn", str, None, "folder of this run inside --save_dir"),
        Flag("--resume", None, False, "continue from --load_path (the same command again continues without this)"),
        Flag("--load_path", str, None, "checkpoint to continue from, with --resume"),
        Flag("--overwrite -o", None, False, "where the run folder holds another configuration: move that aside and "
             "start anew (without it: an error)"),
        Flag("--use_tensorboard", None, False, "write TensorBoard event files (stats.jsonl is always written)"),
        Flag("--num_save_iter", COUNT, 10000, "save latest_model.pth every so many iterations"),
        Flag("--save_seconds", POSITIVE, 600, "and whenever so many seconds have passed"),
    ),
    "length": (
        Flag("--epoch", epoch_count, 1, "1"),
        Flag("--num_train_iter", COUNT, 2 ** 20, "iterations"),
        Flag("--num_eval_iter", COUNT, 5000, "iterations between evaluations (at most 1000 in the last fifth)"),
        Flag("--seed", number(int, 0, 2 ** 32 - 1), 1, "of the labelled split, the initial weights and all draws"),
    ),
    "data": (
        Flag("--data_dir", str, "./data", "folder of the data sets"),
        Flag("--dataset -ds", str, "cifar10", "digits, cifar10, cifar100, svhn, stl10, mnist, imagenet, or the path "
             "of your own images: a folder with train/<class>/ and test/<class>/, or a zip with dataset.json"),
        Flag("--num_classes -nc", number(int, 2), 10, "classes (your own images: counted when not given)"),
        Flag("--num_labels -nl", WHOLE, 40, "labelled images, equally many of every class; 0: all that have a label"),
        Flag("--batch_size -bsz", COUNT, 64, "labelled images in a batch, of all GPUs of a machine together"),
        Flag("--uratio", COUNT, 7, "unlabelled images for every labelled one in a batch"),
        Flag("--eval_batch_size", COUNT, 1024, "images in a batch of the evaluation"),
        Flag("--aug_path", str, None, "folder of labelled extra images, <class>/<image>.png (stage 3 of DPT)"),
        Flag("--real_fraction", SHARE, None, "share of real labelled images in the labelled batch when --aug_path is "
             "given (default: all labelled images are equally likely)"),
        Flag("--aug_filter", str, None, "checkpoint of a classifier that judges the images of --aug_path"),
        Flag("--aug_confidence", SHARE, 0.9, "least probability that --aug_filter gives to an image's label"),
        Flag("--val_fraction", SHARE, 0.0, "share of the training images held out, with their labels, only to choose "
             "an iteration by (result.json: best_on_validation)"),
        Flag("--label_idx", str, None, "take the labelled images from this .npy file of indices (for example another "
             "run's sampled_label_idx.npy) in place of drawing them"),
        Flag("--label_table", parse_bool, True, "CIFAR-10 with 10 labels: take the published sets (seeds 0 to 7)"),
        Flag("--download", None, False, "fetch a published data set that is not in --data_dir"),
        Flag("--train_sampler", ("RandomSampler",), "RandomSampler", "uniform draws with replacement"),
        Flag("--num_workers", WHOLE, 1, "imagenet: four times as many threads decode; other batches are made on the "
             "device, without workers"),
        Flag("--decoder", ("auto", "dali", "torchvision"), "auto", "imagenet: what decodes; auto: NVIDIA DALI on GPUs "
             "where it is installed"),
    ),
    "augmentation": (
        Flag("--weak_flip", parse_bool, True, "weak view: mirror half of the images"),
        Flag("--weak_pad", WHOLE, 4, "weak view: shift by up to so many pixels"),
        Flag("--weak_pad_mode", ("reflect", "zero"), "reflect", "weak view: what comes in from outside"),
        Flag("--weak_subpixel", parse_bool, False, "weak view: shift by fractions of a pixel, bilinear"),
        Flag("--strong_ops", WHOLE, 3, "strong view: RandAugment operations before cutout"),
    ),
    "network": (
        Flag("--net", str, "WideResNet", "WideResNet, WideResNetVar or ResNet50"),
        Flag("--net_from_name", parse_bool, False, "take --net as the name of a torchvision network"),
        Flag("--depth", WHOLE, 28, "layers of a wide residual network"),
        Flag("--widen_factor", WHOLE, 2, "its width"),
        Flag("--leaky_slope", POSITIVE, 0.1, "slope of its LeakyReLU"),
        Flag("--dropout", SHARE, 0.0, "dropout rate inside its blocks"),
        Flag("--bn_momentum", SHARE, None, "weight of a new batch in its batch-norm statistics [the network's own, "
             "0.001 in wide residual networks]"),
    ),
    "optimisation": (
        Flag("--optim", ("SGD", "AdamW"), "SGD", "SGD has Nesterov momentum"),
        Flag("--lr", POSITIVE, 0.03, "learning rate at the start of the cosine"),
        Flag("--momentum", SHARE, 0.9, "of SGD"),
        Flag("--weight_decay", POSITIVE, 5e-4, "on all parameters but biases and batch norm"),
        Flag("--num_warmup_iter", WHOLE, 0, "iterations over which the learning rate rises from 0"),
        Flag("--ema_m", SHARE, 0.999, "momentum of the averaged weights that are evaluated"),
        Flag("--clip", POSITIVE, 0.0, "largest norm of the gradient; 0: no limit"),
    ),
    "speed": (
        Flag("--amp", parse_bool, False, "fp16 with a loss scaler; False: fp32"),
        Flag("--precision", ("auto", "fp32", "bf16", "fp16"), "auto", "overrules --amp; auto: what amp says where it "
             "is given, else bf16 on GPUs that have it, else fp32"),
        Flag("--compile", ("auto", "True", "False"), "auto", "torch.compile the network; auto: on GPUs"),
        Flag("--strict", None, False, "the paper's arithmetic step for step: fp32 without TF32, deterministic "
             "kernels, nothing compiled or fused"),
        Flag("--device", str, None, "cpu, cuda, cuda:1 or mps (default: the GPUs where there are any)"),
    ),
    "processes": (
        Flag("--world-size --world_size", COUNT, 1, "machines"),
        Flag("--rank", WHOLE, 0, "number of this machine"),
        Flag("--dist-url --dist_url -du", str, "tcp://127.0.0.1:11111", "meeting point of several machines"),
        Flag("--dist-backend --dist_backend", ("nccl", "gloo"), "nccl", "accepted; nccl is used on GPUs, gloo on CPUs"),
        Flag("--gpu", WHOLE, None, "use this one GPU"),
        Flag("--multiprocessing-distributed --multiprocessing_distributed", parse_bool, True,
             "one process per visible GPU"),
    ),
}

# What may differ between a command and the run it continues: nothing here changes the numbers.
NOT_THE_METHOD = frozenset({
    "c", "given", "save_dir", "save_name", "resume", "load_path", "overwrite", "use_tensorboard", "data_dir",
    "num_save_iter", "save_seconds", "eval_batch_size", "download", "num_workers", "decoder", "rank", "dist_url",
    "dist_backend", "gpu", "multiprocessing_distributed", "device", "epoch", "train_sampler", "label_idx"})


def parse_options(algorithm: str, description: str, flags: Sequence[Flag], argv: Sequence[str] | None = None,
                  also: str | None = None, **defaults: Any) -> argparse.Namespace:
    """Read the command line of one trainer.

    algorithm: its published name, the default of --save_name and, with `also`, the only value of the YAML key `alg`.
    flags: those of its loss. defaults: where it departs from the common defaults. The result has one attribute per
    flag, `given` (the names set by file or command line) and `alg`. Raises UserError.
    """
    groups = {algorithm: tuple(flags), **COMMON}
    parser = build_parser(algorithm, description, groups, also, **{"save_name": algorithm, **defaults})
    options = parser.parse_with_yaml(argv)
    _check(options)
    return options


def build_parser(algorithm: str, description: str, groups: dict[str, Sequence[Flag]], also: str | None = None,
                 **defaults: Any) -> Parser:
    """Return the parser of `groups` of flags (title -> flags), with other `defaults` for some of them.

    A file's key `alg` may be `algorithm` or `also`.
    """
    # `rich` text would reflow the first paragraph; the rest of a module's docstring is for its readers.
    parser = Parser(description=description.strip().split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--c", metavar="FILE", default=None, help="YAML file with any of these options as keys")
    names = (algorithm, also) if also else (algorithm,)
    parser.add_argument("--alg", choices=names, default=algorithm, help=argparse.SUPPRESS)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag, defaults)
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag, defaults: dict[str, Any]) -> None:
    names = flag.names.split()
    key = names[0].lstrip("-").replace("-", "_")
    default = defaults.get(key, flag.default)
    if flag.type is None:
        # `--resume`, as some of the published commands have it, and `--resume True`, as the others do
        group.add_argument(*names, dest=key, nargs="?", const=True, type=parse_bool, default=default, metavar="True",
                           help=flag.help)
        return
    shown = "" if default is None else f" [{default}]"
    kind: dict[str, Any] = {"choices": flag.type} if isinstance(flag.type, tuple) else {"type": flag.type}
    group.add_argument(*names, dest=key, default=default, metavar=None if "choices" in kind else "",
                       help=flag.help.replace("%", "%%") + shown, **kind)


def _check(options: argparse.Namespace) -> None:
    """Refuse combinations that no single flag shows; UserError."""
    if not re.fullmatch(r"[^/\\\0]+", options.save_name) or options.save_name in (".", ".."):
        raise UserError(f"--save_name {options.save_name!r} must be the name of one folder (its parent is --save_dir)")
    if options.resume and options.load_path is None and "load_path" not in options.given:
        raise UserError("--resume needs --load_path FILE; without both, the same command continues by itself")
    if options.load_path is not None and not os.path.isfile(options.load_path) and options.resume:
        raise UserError(f"--load_path: there is no file {options.load_path}")
    if options.val_fraction == 1:
        raise UserError("--val_fraction 1 leaves nothing to train on; give a share below 1")
    for key in ("real_fraction", "aug_filter"):
        if getattr(options, key) is not None and options.aug_path is None:
            raise UserError(f"--{key} needs --aug_path: there are no extra images to mix or filter")
    if options.weak_subpixel and options.weak_pad_mode != "zero":
        raise UserError("--weak_subpixel True needs --weak_pad_mode zero")
    if options.num_warmup_iter >= options.num_train_iter and options.num_warmup_iter > 0:
        raise UserError(f"--num_warmup_iter {options.num_warmup_iter} must be less than --num_train_iter "
                        f"{options.num_train_iter}")


def method_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide the numbers, as plain values: what a continued run must agree on."""
    return {key: value for key, value in sorted(vars(options).items()) if key not in NOT_THE_METHOD}


def relaunch(options: argparse.Namespace, gpus: int) -> None:
    """Start one process per GPU with torchrun in place of this process, where that is asked for; return otherwise.

    gpus: visible GPUs. Nothing happens inside torchrun, with --gpu, on another --device, or with a single process.
    """
    if "RANK" in os.environ or options.gpu is not None or not options.multiprocessing_distributed:
        return
    if options.device not in (None, "cuda") or gpus * options.world_size <= 1:
        return
    if options.batch_size % gpus:
        raise UserError(f"--batch_size {options.batch_size} cannot be shared evenly by the {gpus} visible GPUs; choose "
                        "a multiple, or fewer GPUs through CUDA_VISIBLE_DEVICES")
    if options.world_size == 1:
        meeting = ["--standalone"]
    else:
        endpoint = options.dist_url.removeprefix("tcp://")
        meeting = [f"--nnodes={options.world_size}", f"--node_rank={options.rank}", "--rdzv_backend=static",
                   f"--rdzv_endpoint={endpoint}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc_per_node={gpus}", *sys.argv]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)
