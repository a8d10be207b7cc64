"""The options that the training scripts share: the published flags with their defaults, then ours."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from shared.cli import Choice, Flag, Float, Int, IntTuple, Option, UserError, parse
from shared.data.datasets import load_dataset
from shared.option_types import NameOrPath

DATASETS = {"cifar10": 10, "cifar100": 100, "svhn": 10, "digits": 10}
ARCHITECTURES = ("convlarge", "shakeshake", "small")
COUNT, WHOLE, POSITIVE = Int(1), Int(0), Float(0, open=True)
NOT_NEGATIVE, FRACTION = Float(0), Float(0, 1)

# What may differ between a command and the run that it continues: nothing here changes the numbers (`batch_size` of
# ImageNet: that of all processes counts; decoders differ by a grey level at most).
NOT_THE_METHOD = frozenset({"data_path", "download", "num_workers", "resume", "print_freq", "save_path", "gpu",
                            "overwrite", "start_step", "compile", "pretrained", "given"})
NOT_THE_METHOD_OF_IMAGENET = frozenset({
    "data", "workers", "batch_size", "print_freq", "resume", "start_epoch", "save_path", "local_rank", "dali_cpu",
    "gamma", "decoder", "device", "evaluate", "skip_bad", "iterations", "overwrite", "save_seconds", "compile",
    "pretrained", "given"})

ALPHA = Option("--alpha", POSITIVE, 1.0, "mix-up coefficients are drawn from Beta(alpha, alpha)")
EPSILON = Option("--epsilon", POSITIVE, 1e-2, "L2 norm of the perturbation of the weights")
RESUME = Option("--resume", metavar="FILE", help="checkpoint to continue (the same command again continues without it)")

# ---------------------------------------------------------------- train_meta.py and train_baseline.py

DATA_AND_NETWORK = (
    Option("--dataset", NameOrPath(*DATASETS), "cifar10", "a data set (digits: 1,797 handwritten digits, no files "
           "needed), or own images: a folder with train/ and test/, see README.md"),
    Option("--data-path", default="./data", metavar="DIR", help="folder of the data sets"),
    Option("--num-label", COUNT, 4000, "labelled images in all, equally many of every class"),
    Option("-a --architecture", Choice(*ARCHITECTURES), "convlarge", "small: for the digits"),
)
MIX_UP = (
    Option("--mix-up", Flag, False, "mix labelled with unlabelled images, in place of the labelled loss"),
    ALPHA,
)
OPTIMISATION = (
    Option("--total-steps", COUNT, 400000, "end of the training"),
    Option("--start-step", WHOLE, 0, "first step of a new run"),
    Option("--batch-size", COUNT, 128, "labelled images in a batch of all processes, and as many unlabelled ones"),
    Option("--lr", NOT_NEGATIVE, 0.1, "highest learning rate, and meta-rate of train_meta.py"),
    Option("--warmup", WHOLE, 4000, "steps over which the learning rate, and the weight of the unlabelled loss, rise"),
    Option("--gamma", NOT_NEGATIVE, 0.1, "factor on the learning rate after each milestone"),
    Option("--milestones", IntTuple(0), (300000, 350000), "steps of these decays"),
    Option("--weight-decay", NOT_NEGATIVE, 1e-4, "on all parameters"),
    Option("--momentum", FRACTION, 0.9, "of SGD"),
)
RUNNING = (
    Option("--num-workers", WHOLE, 4, "accepted; images are prepared on the device, in whole batches"),
    RESUME,
    Option("--seed", WHOLE, 1234, "seed of the labelled split, weights and all draws"),
    Option("--print-freq", COUNT, 100, "steps between lines of the log"),
    Option("--test-freq", COUNT, 400, "steps between evaluations, each followed by a checkpoint"),
    Option("--save-path", default="./results/tmp", metavar="DIR", help="folder of the run"),
    Option("--gpu", Flag, False, "use a GPU (each process its own); without it the CPU"),
)

# ---------------------------------------------------------------- train_meta_imagenet.py and train_imagenet.py

IMAGENET_DATA = (
    Option("--data", default="./data", metavar="DIR", help="folder of the nine files that im2rec.py writes"),
    Option("--num-classes", COUNT, 1000, "classes"),
    Option("--imsize", COUNT, 256, "shorter side of a validation image before its centre is cut out"),
    Option("--imcrop", COUNT, 224, "side of the images that the network sees"),
    Option("-j --workers", COUNT, 4, "threads of a process that decode images"),
)
IMAGENET_OPTIMISATION = (
    Option("--batch-size", COUNT, 64, "labelled images in a batch of one process; train_meta_imagenet.py: and as many "
           "unlabelled ones"),
    Option("--epochs", COUNT, 600, "passes over the labelled images; train_meta_imagenet.py: the unlabelled ones"),
    Option("--start-epoch", WHOLE, 0, "first epoch of a new run"),
    Option("--lr --learning-rate", NOT_NEGATIVE, 0.1, "highest learning rate, for any batch size"),
    Option("--warmup", WHOLE, 5, "epochs over which the learning rate rises; then half a cosine"),
    Option("--gamma", NOT_NEGATIVE, 0.1, "accepted; the schedule does not use it"),
    Option("--momentum", FRACTION, 0.9, "of SGD"),
    Option("--wd --weight-decay", NOT_NEGATIVE, 1e-4, "on all parameters", key="weight_decay"),
)
IMAGENET_RUNNING = (
    RESUME,
    Option("--save-path", default="results/tmp", metavar="DIR", help="folder of the run"),
    Option("--print-freq", COUNT, 50, "iterations between lines of the log"),
    Option("--local_rank --local-rank", WHOLE, None, "given by torch.distributed.launch"),
    Option("--dali-cpu", Flag, False, "decode on the CPU in place of the GPU"),
)

# ---------------------------------------------------------------- beyond the published flags

META = (
    Option("--meta-grad", Choice("finite", "exact"), "finite", "by a finite difference, or exactly by forward-mode "
           "differentiation"),
    Option("--local-meta", Flag, False, "with several processes: each takes the gradient of its own labelled images "
           "(default: of the whole batch)"),
    Option("--meta-lr", NOT_NEGATIVE, 1.0, "factor on the meta-rate"),
)
ARITHMETIC = (
    Option("--precision", Choice("auto", "fp32", "bf16"), "auto", "auto: bf16 on GPUs that have it, else fp32"),
    Option("--strict", Flag, False, "the paper's arithmetic: fp32 without TF32, deterministic kernels, nothing fused"),
    Option("--compile", Flag, None, "torch.compile the network", default_help="on a GPU, unless --strict"),
)
PRETRAINED = Option("--pretrained", metavar="FILE", help="start from the weights of a file (.pth, .safetensors); for "
                    "other classes the label layer is made anew")
OVERWRITE = Option("--overwrite", Flag, False, "start anew in a folder of another run (without it: an error)")
OURS = (
    PRETRAINED,
    *ARITHMETIC,
    Option("--download", Flag, False, "fetch missing files of the data set"),
    OVERWRITE,
)
IMAGENET_OURS = (
    Option("--seed", WHOLE, 12, "seed of the weights and all draws"),
    Option("--evaluate", Flag, False, "measure the network of --resume, or of the run in --save-path, on the "
           "validation images and stop"),
    Option("--skip-bad", Flag, False, "leave out records that cannot be read, and count them"),
    Option("--decoder", Choice("auto", "dali", "torchvision"), "auto", "auto: NVIDIA DALI if installed"),
    Option("--iterations", COUNT, None, "stop after this number of iterations, for a trial; the schedule stays that of "
           "--epochs"),
    Option("--save-seconds", NOT_NEGATIVE, 600.0, "time between two checkpoints, one of which follows every epoch",
           unit="s"),
    PRETRAINED,
    *ARITHMETIC,
    Option("--device", metavar="NAME", help="cpu, cuda or cuda:1", default_help="all GPUs, if any"),
    OVERWRITE,
)


def read_options(script: str, doc: str, flags: Mapping[str, Sequence[Option]],
                 argv: Sequence[str] | None) -> SimpleNamespace:
    """Return the options of train_meta.py or train_baseline.py; raise UserError for contradictions.

    The result also has `num_classes`, and `method`: the options that decide the numbers, as plain values.
    """
    options = parse(doc, flags, argv)
    is_own = options.dataset not in DATASETS
    classes = options.num_classes = number_of_classes(options) if is_own else DATASETS[options.dataset]
    if options.num_label < classes:
        raise UserError(f"--num-label {options.num_label}: {options.dataset} has {classes} classes, give at least "
                        f"{classes}")
    if options.start_step >= options.total_steps:
        raise UserError(f"--start-step {options.start_step} must be less than --total-steps {options.total_steps}")
    if options.dataset == "digits" and options.architecture != "small":
        raise UserError(f"-a {options.architecture} is for images of 32x32, the digits are 8x8: give -a small")
    if options.architecture == "small" and options.dataset != "digits" and not is_own:
        raise UserError(f"-a small is for the digits; give -a convlarge or -a shakeshake for {options.dataset}")
    _with_method(options, script, NOT_THE_METHOD)
    if is_own:
        options.method["dataset"] = "own images"  # which ones, their content says
    return options


def number_of_classes(options: SimpleNamespace) -> int:
    """Return the number of classes of own images; UserError for those without labels or of a wrong size."""
    train = load_dataset(options.dataset, "train")
    if not train.has_labels or train.labels.min() < 0:
        raise UserError(f"--dataset {options.dataset}: every training image needs a label (class folders, dataset.json "
                        "or labels.csv)")
    if options.architecture == "shakeshake" and train.size != (32, 32):
        raise UserError(f"-a shakeshake is for images of 32x32, those of {options.dataset} are {train.size[1]}x"
                        f"{train.size[0]}: give -a convlarge or -a small")
    if options.architecture == "convlarge" and min(train.size) < 12:
        raise UserError(f"-a convlarge is for images of 12x12 and more, those of {options.dataset} are "
                        f"{train.size[1]}x{train.size[0]}: give -a small")
    return train.num_classes


def read_imagenet_options(script: str, doc: str, flags: Mapping[str, Sequence[Option]],
                          argv: Sequence[str] | None) -> SimpleNamespace:
    """Return the options of train_meta_imagenet.py or train_imagenet.py, with `method`; see `read_options`."""
    options = parse(doc, flags, argv)
    # Older launchers pass the flag alone.
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    if options.imsize < options.imcrop:
        raise UserError(f"--imsize {options.imsize} is smaller than --imcrop {options.imcrop}; validation images are "
                        "cut out of the resized ones")
    if options.start_epoch >= options.epochs:
        raise UserError(f"--start-epoch {options.start_epoch} must be less than --epochs {options.epochs}")
    if not os.path.isdir(options.data):
        raise UserError(f"--data: there is no folder {options.data}; expected one with the files of im2rec.py "
                        "(train_label, train_unlabel and val, each .rec and .idx)")
    return _with_method(options, script, NOT_THE_METHOD_OF_IMAGENET)


def _with_method(options: SimpleNamespace, script: str, other: frozenset[str]) -> SimpleNamespace:
    if options.precision == "bf16" and options.strict:
        raise UserError("--strict is fp32; leave out --precision bf16")
    if options.pretrained and options.resume:
        raise UserError("--pretrained starts a run, --resume continues one; give one of them")
    plain = {key: value for key, value in sorted(vars(options).items()) if key not in other}
    options.method = {"script": script, **plain}
    return options
