"""The flags that all TorchSSL trainers share: published names and defaults first, then ours.

A learner adds the flags of its own loss. The command line overrules the YAML file of `--c`, which overrules the
defaults.
"""
from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from shared.cli import Bool, Choice, Flag, Float, Int, Option, Text, UserError, parse
from shared.data.datasets import NAMES

NETWORK = (
    Option("--net", Text, "WideResNet", "WideResNet, WideResNetVar, ResNet50, or timm:NAME, any classifier of timm"),
    Option("--net_from_name", Bool, False, "take --net as the name of a torchvision network"),
    Option("--depth", Int(0), 28, "layers of a wide residual network"),
    Option("--widen_factor", Int(0), 2, "its width"),
    Option("--leaky_slope", Float(0), 0.1, "slope of its LeakyReLU"),
    Option("--dropout", Float(0, 1), 0.0, "dropout rate inside its blocks"),
    Option("--bn_momentum", Float(0, 1), None, "weight of a new batch in its batch-norm statistics",
           default_help="the network's own, 0.001 in wide residual networks"),
)
COMMON = {
    "output": (
        Option("--save_dir", Text, "./saved_models", "folder of all runs"),
        Option("--save_name -sn", Text, None, "folder of this run inside --save_dir"),
        Option("--resume", Flag, False, "continue from --load_path (the same command again continues without this)"),
        Option("--load_path", Text, None, "checkpoint to continue from, with --resume"),
        Option("--overwrite -o", Flag, False, "if the run folder holds another configuration: move that aside and "
               "start anew (without it: an error)"),
        Option("--use_tensorboard", Flag, False, "write TensorBoard event files (stats.jsonl is always written)"),
        Option("--num_save_iter", Int(1), 10000, "save latest_model.pth at this interval", unit="iterations"),
        Option("--save_seconds", Float(0), 600, "and after this time since the last save", unit="seconds"),
    ),
    "length": (
        Option("--epoch", Int(1, 1), 1, "accepted: one epoch is the whole run; see --num_train_iter"),
        Option("--num_train_iter", Int(1), 2 ** 20, "length of the training", unit="iterations"),
        Option("--num_eval_iter", Int(1), 5000, "distance of evaluations (at most 1000 in the last fifth)",
               unit="iterations"),
        Option("--seed", Int(0, 2 ** 32 - 1), 1, "seed of the labelled split, the initial weights and all draws"),
    ),
    "data": (
        Option("--data_dir", Text, "./data", "folder of the data sets"),
        Option("--dataset -ds", Text, "cifar10", "digits, cifar10, cifar100, svhn, stl10, mnist, imagenet, or the path "
               "of your own images: a folder with train/<class>/ and test/<class>/, or a zip with dataset.json"),
        Option("--num_classes -nc", Int(2), 10, "classes (your own images: counted when not given)"),
        Option("--num_labels -nl", Int(0), 40, "labelled images, equally many of every class; 0: all that have a "
               "label"),
        Option("--batch_size -bsz", Int(1), 64, "labelled images in a batch, of all GPUs of a machine together"),
        Option("--uratio", Int(1), 7, "unlabelled images for every labelled one in a batch"),
        Option("--eval_batch_size", Int(1), 1024, "batch of the evaluation", unit="images"),
        Option("--aug_path", Text, None, "folder of labelled extra images, <class>/<image>.png (stage 3 of DPT)"),
        Option("--real_fraction", Float(0, 1), None, "fraction of real labelled images in the labelled batch when "
               "--aug_path is given (default: all labelled images are equally likely)"),
        Option("--aug_filter", Text, None, "checkpoint of a classifier that judges the images of --aug_path"),
        Option("--aug_confidence", Float(0, 1), 0.9, "least probability that --aug_filter gives to an image's label"),
        Option("--val_fraction", Float(0, 1, open="high"), 0.0, "fraction of the training images held out, with their "
               "labels, only to choose an iteration by (result.json: best_on_validation)"),
        Option("--label_idx", Text, None, "take the labelled images from this .npy file of indices (for example "
               "another run's sampled_label_idx.npy) in place of drawing them"),
        Option("--labels", Text, None, "CSV of the columns file and label, such as label_these.csv filled in: labels "
               "of own training images (default: labels.csv in their folder or beside it, else the class folders)"),
        Option("--label_table", Bool, True, "CIFAR-10 with 10 labels: take the published sets (seeds 0 to 7)"),
        Option("--download", Flag, False, "fetch a published data set that is not in --data_dir"),
        Option("--train_sampler", Choice("RandomSampler"), "RandomSampler", "uniform draws with replacement"),
        Option("--num_workers", Int(0), 1, "imagenet: four times as many threads decode; other batches are made on "
               "the device, without workers"),
        Option("--decoder", Choice("auto", "dali", "torchvision"), "auto",
               "imagenet: decoder; auto: NVIDIA DALI on GPUs, if installed"),
    ),
    "augmentation": (
        Option("--weak_flip", Bool, True, "weak view: mirror half of the images"),
        Option("--weak_pad", Int(0), 4, "weak view: largest shift", unit="pixels"),
        Option("--weak_pad_mode", Choice("reflect", "zero"), "reflect", "weak view: pixels beyond the edge"),
        Option("--weak_subpixel", Bool, False, "weak view: shift by fractions of a pixel, bilinear"),
        Option("--strong_ops", Int(0), 3, "strong view: RandAugment operations before cutout"),
    ),
    "network": NETWORK,
    "pretrained": (
        Option("--pretrained", Text, None, "start from the weights of a file (.pth, .safetensors), or of timm:NAME, "
               "which timm fetches; for other classes the label layer is made anew"),
        Option("--freeze", Text, None, "parts that do not learn: backbone (all but the label layer), or names of "
               "modules, such as conv1,block1"),
        Option("--head_lr", Float(0), None, "learning rate of the label layer (default: --lr)"),
    ),
    "optimisation": (
        Option("--optim", Choice("SGD", "AdamW"), "SGD", "SGD has Nesterov momentum"),
        Option("--lr", Float(0), 0.03, "learning rate at the start of the cosine"),
        Option("--momentum", Float(0, 1), 0.9, "of SGD"),
        Option("--weight_decay", Float(0), 5e-4, "on all parameters but biases and batch norm"),
        Option("--num_warmup_iter", Int(0), 0, "linear rise of the learning rate from 0", unit="iterations"),
        Option("--ema_m", Float(0, 1), 0.999, "momentum of the averaged weights that are evaluated"),
        Option("--clip", Float(0), 0.0, "largest norm of the gradient; 0: no limit"),
    ),
    "speed": (
        Option("--amp", Bool, False, "fp16 with a loss scaler; False: fp32"),
        Option("--precision", Choice("auto", "fp32", "bf16", "fp16"), "auto", "overrules --amp; auto: follow --amp if "
               "it is given, else bf16 on GPUs that have it, else fp32"),
        Option("--compile", Choice("auto", "True", "False"), "auto", "torch.compile the network; auto: on GPUs"),
        Option("--strict", Flag, False, "the paper's arithmetic step for step: fp32 without TF32, deterministic "
               "kernels, nothing compiled or fused"),
        Option("--device", Text, None, "cpu, cuda or cuda:1 (default: the GPUs, if there are any)"),
    ),
    "processes": (
        Option("--world-size --world_size", Int(1), 1, "machines"),
        Option("--rank", Int(0), 0, "number of this machine"),
        Option("--dist-url --dist_url -du", Text, "tcp://127.0.0.1:11111", "meeting point of several machines"),
        Option("--dist-backend --dist_backend", Choice("nccl", "gloo"), "nccl", "accepted; GPUs use nccl, CPUs gloo"),
        Option("--gpu", Int(0), None, "use this one GPU"),
        Option("--multiprocessing-distributed --multiprocessing_distributed", Bool, True, "one process per visible "
               "GPU"),
    ),
}

# Of the scripts that use a trained classifier; options that are not given are those of its training.
PREDICTION = (
    Option("--load_path", Text, "./saved_models/fixmatch/model_best.pth", "checkpoint of the classifier"),
    Option("--use_train_model", Flag, False, "the weights as trained, in place of their moving average"),
    Option("--batch_size", Int(1), 256, "batch of the prediction", unit="images"),
    Option("--data_dir", Text, "./data", "folder of the data sets"),
    Option("--dataset -ds", Text, "cifar10", "name or path, as in the training"),
    Option("--num_classes -nc", Int(1), 10, "classes"),
    Option("--download", Flag, False, "fetch a published data set that is not in --data_dir"),
    Option("--device", Text, None, "cpu, cuda or cuda:1", default_help="a GPU if available"),
)

# Options that decide about predictions, besides the content of the files.
PREDICTED_BY = ("use_train_model", "num_classes", *(option.key for option in NETWORK))

# A command may continue a run with other values of these: none of them changes the numbers.
NOT_THE_METHOD = frozenset({
    "c", "given", "save_dir", "save_name", "resume", "load_path", "overwrite", "use_tensorboard", "data_dir",
    "num_save_iter", "save_seconds", "eval_batch_size", "download", "num_workers", "decoder", "rank", "dist_url",
    "dist_backend", "gpu", "multiprocessing_distributed", "device", "epoch", "train_sampler", "label_idx",
    "pretrained"})


def learner_options(algorithm: str, doc: str, flags: Sequence[Option], argv: Sequence[str] | None = None,
                    also: str | None = None, **defaults: Any) -> SimpleNamespace:
    """Read the command line of a learner (None: this process's).

    algorithm: its published name, the default of --save_name and, with `also`, the only value of the YAML key `alg`.
    flags: those of its loss. defaults: its departures from the common defaults. The result has an attribute for every
    flag, `alg`, and `given`: the names set by file or command line. Raises UserError.
    """
    names = Choice(algorithm, also) if also else Choice(algorithm)
    own = (*flags, Option("--alg", names, algorithm, "accepted: the name of the algorithm", hidden=True))
    defaults = {"save_name": algorithm, **defaults}
    groups = {title: [dataclasses.replace(option, default=defaults.get(option.key, option.default))
                      for option in options]
              for title, options in {algorithm: own, **COMMON}.items()}
    options = parse(doc, groups, argv, config="--c")
    _check_combinations(options)
    return options


def _check_combinations(options: SimpleNamespace) -> None:
    if not re.fullmatch(r"[^/\\\0]+", options.save_name) or options.save_name in (".", ".."):
        raise UserError(f"--save_name {options.save_name!r} must be the name of one folder (its parent is --save_dir)")
    if options.resume and options.load_path is None and "load_path" not in options.given:
        raise UserError("--resume needs --load_path FILE; without both, the same command continues by itself")
    if options.resume and options.load_path is not None and not os.path.isfile(options.load_path):
        raise UserError(f"--load_path: there is no file {options.load_path}")
    for key in ("real_fraction", "aug_filter"):
        if getattr(options, key) is not None and options.aug_path is None:
            raise UserError(f"--{key} needs --aug_path: there are no extra images to mix or filter")
    if options.aug_filter is not None and not os.path.isfile(options.aug_filter):
        raise UserError(f"--aug_filter: there is no file {options.aug_filter}")
    if options.weak_subpixel and options.weak_pad_mode != "zero":
        raise UserError("--weak_subpixel True needs --weak_pad_mode zero")
    if options.num_warmup_iter >= options.num_train_iter and options.num_warmup_iter > 0:
        raise UserError(f"--num_warmup_iter {options.num_warmup_iter} must be less than --num_train_iter "
                        f"{options.num_train_iter}")


def method_config(options: SimpleNamespace) -> dict[str, Any]:
    """Return the options that decide the numbers, as plain values; a continued run must agree on them."""
    other = NOT_THE_METHOD | set(paths_in(options))
    return {key: value for key, value in sorted(vars(options).items()) if key not in other}


def paths_in(options: SimpleNamespace) -> tuple[str, ...]:
    """Return the options that name input files and folders, compared by content (see `input_fingerprints`)."""
    return ("aug_path", "aug_filter") if options.dataset in NAMES else ("aug_path", "aug_filter", "dataset", "labels")


def relaunch(options: SimpleNamespace, gpus: int) -> None:
    """Replace this process by torchrun with one process per visible GPU, if there is more than one process to start.

    Return instead inside torchrun, with --gpu, and on another --device.
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
