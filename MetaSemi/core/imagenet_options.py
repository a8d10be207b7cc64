"""The command lines of train_meta_imagenet.py and train_imagenet.py: the published flags, then ours.

Nothing heavy is imported here, so that `--help` answers at once.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from shared.cli import Parser, UserError, nearest
from shared.flag_types import number

# torchvision's classifiers, all of them; MetaSemi/core/classifiers.py builds them.
ARCHITECTURES = (
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "densenet121", "densenet161",
    "densenet169", "densenet201", *(f"efficientnet_b{size}" for size in range(8)), "efficientnet_v2_l",
    "efficientnet_v2_m", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet0_75",
    "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    *(f"regnet_{kind}_{size}" for kind in "xy" for size in ("16gf", "1_6gf", "32gf", "3_2gf", "400mf", "800mf", "8gf")),
    "regnet_y_128gf", "resnet101", "resnet152", "resnet18", "resnet34", "resnet50", "resnext101_32x8d",
    "resnext101_64x4d", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s",
    "swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_16",
    "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2", "wide_resnet50_2")
COUNT, WHOLE = number(int, 1), number(int, 0)
NONNEGATIVE, SHARE, ABOVE_ZERO = number(float, 0), number(float, 0, 1), number(float, 1e-12)

# What may differ between a command and the run that it continues: nothing here changes the numbers (`batch_size`: that
# of all processes counts; decoders differ by a grey level at most).
NOT_THE_METHOD = frozenset({
    "data", "workers", "batch_size", "print_freq", "resume", "start_epoch", "save_path", "local_rank", "dali_cpu",
    "gamma", "decoder", "device", "evaluate", "skip_bad", "iterations", "overwrite", "save_seconds"})


def architecture(text: str) -> str:
    if text not in ARCHITECTURES:
        raise argparse.ArgumentTypeError(f'unknown network "{text}"{nearest(text, ARCHITECTURES)}; expected a '
                                         f"classifier of torchvision such as resnet18, resnet50, vgg16_bn")
    return text


def parse(description: str, meta: bool, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of train_meta_imagenet.py (meta) or train_imagenet.py; raise UserError for what does not fit.

    The result also has `method`: the options that decide the numbers, as plain values.
    """
    parser = Parser(description=description.strip().split("\n\n")[0], allow_abbrev=False)
    add_published(parser, meta)
    add_ours(parser, meta)
    options = parser.parse_args(argv)
    check(options)
    # A launcher of former times says it by the flag alone.
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    options.method = {"script": "train_meta_imagenet" if meta else "train_imagenet",
                      **{key: value for key, value in sorted(vars(options).items()) if key not in NOT_THE_METHOD}}
    return options


def add_published(parser: Parser, meta: bool) -> None:
    def add(*names: str, kind: Any, default: Any = None, text: str, **more: Any) -> None:
        shown = "" if default is None else f" [{default}]"
        group.add_argument(*names, type=kind, default=default, metavar="", help=text + shown, **more)

    group = parser.add_argument_group("data and network")
    add("--data", kind=str, default="./data", text="folder of the nine files that im2rec.py writes")
    add("-a", "--arch", kind=architecture, default="resnet18", text="a classifier of torchvision")
    add("--num-classes", kind=COUNT, default=1000, text="classes")
    add("--imsize", kind=COUNT, default=256, text="shorter side of a validation image before its centre is cut out")
    add("--imcrop", kind=COUNT, default=224, text="side of the images that the network sees")
    add("-j", "--workers", kind=COUNT, default=4, text="threads of a process that decode images")
    group = parser.add_argument_group("optimisation")
    add("--batch-size", kind=COUNT, default=64, text="labelled images in a batch of one process" + (
        ", and as many unlabelled ones" if meta else ""))
    add("--epochs", kind=COUNT, default=600, text="passes over the " + ("unlabelled" if meta else "labelled") +
        " images")
    add("--start-epoch", kind=WHOLE, default=0, text="first epoch of a new run")
    add("--lr", "--learning-rate", kind=NONNEGATIVE, default=0.1, text="highest learning rate, whatever the batch size",
        dest="lr")
    add("--warmup", kind=WHOLE, default=5, text="epochs over which the learning rate rises; then half a cosine")
    add("--gamma", kind=NONNEGATIVE, default=0.1, text="accepted; the schedule has no use for it")
    add("--momentum", kind=SHARE, default=0.9, text="of SGD")
    add("--wd", "--weight-decay", kind=NONNEGATIVE, default=1e-4, text="on all parameters", dest="weight_decay")
    if meta:
        add("--alpha", kind=ABOVE_ZERO, default=1.0, text="mix-up coefficients are drawn from Beta(alpha, alpha)")
        add("--epsilon", kind=ABOVE_ZERO, default=1e-2, text="L2 norm of the perturbation of the weights")
    group = parser.add_argument_group("running")
    add("--resume", kind=str, text="checkpoint to continue (the same command again continues without it)")
    add("--save-path", kind=str, default="results/tmp", text="folder of the run")
    add("--print-freq", kind=COUNT, default=50, text="iterations between lines of the log")
    add("--local_rank", "--local-rank", kind=WHOLE, text="given by torch.distributed.launch", dest="local_rank")
    group.add_argument("--dali-cpu", action="store_true", help="decode on the CPU although there is a GPU")


def add_ours(parser: Parser, meta: bool) -> None:
    group = parser.add_argument_group("beyond the published flags")
    if meta:
        group.add_argument("--meta-grad", choices=("finite", "exact"), default="finite", help="finite difference, or "
                           "exactly by forward-mode differentiation [finite]")
        group.add_argument("--local-meta", action="store_true", help="with several processes: each takes the gradient "
                           "of its own labelled images, as the original does (default: of the whole batch)")
        group.add_argument("--meta-lr", type=NONNEGATIVE, default=1.0, metavar="", help="factor on the meta-rate [1.0]")
    group.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=12, metavar="",
                       help="of the weights and all draws [12]")
    group.add_argument("--evaluate", action="store_true", help="measure the network of --resume, or of the run in "
                       "--save-path, on the validation images and stop")
    group.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be read, and count them")
    group.add_argument("--decoder", choices=("auto", "dali", "torchvision"), default="auto",
                       help="auto: NVIDIA DALI where it is installed")
    group.add_argument("--iterations", type=COUNT, metavar="", help="stop after so many iterations, for a trial; the "
                       "schedule stays that of --epochs")
    group.add_argument("--save-seconds", type=NONNEGATIVE, default=600, metavar="", help="save whenever so many "
                       "seconds have passed, and after every epoch [600]")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="auto: bf16 on GPUs that have it, else fp32")
    group.add_argument("--strict", action="store_true", help="the paper's arithmetic: fp32 without TF32, deterministic "
                       "kernels, nothing fused")
    group.add_argument("--device", metavar="", help="cpu, cuda or cuda:1 (default: the GPUs where there are any)")
    group.add_argument("--overwrite", action="store_true", help="start anew where the folder holds a run with other "
                       "settings (without it: an error)")


def check(options: argparse.Namespace) -> None:
    """Refuse what no single flag shows; UserError."""
    if options.imsize < options.imcrop:
        raise UserError(f"--imsize {options.imsize} is smaller than --imcrop {options.imcrop}; validation images are "
                        "cut out of the resized ones")
    if options.start_epoch >= options.epochs:
        raise UserError(f"--start-epoch {options.start_epoch} must be less than --epochs {options.epochs}")
    if options.precision == "bf16" and options.strict:
        raise UserError("--strict is fp32; leave out --precision bf16")
    if not os.path.isdir(options.data):
        raise UserError(f"--data: there is no folder {options.data}; expected one with the files of im2rec.py "
                        "(train_label, train_unlabel and val, each .rec and .idx)")
    if options.resume is not None and not os.path.isfile(options.resume):
        raise UserError(f"--resume: there is no file {options.resume}; leave it out to start from the beginning")
