"""Write every configuration file of TorchSSL/config from the tables below.

    python make_configs.py

Published: config/<algorithm>/<algorithm>_<dataset>_<labels>_0.yaml, key by key as TorchSSL has them. Ours: one for the
handwritten digits with 40 labels for every algorithm, a run of seconds to a minute on a CPU.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.cli import parse, run_main
from shared.training.files import make_dir, write_text

CONFIG = Path(__file__).resolve().parent / "config"

# The keys of each algorithm, in the order of the files; the order of the algorithms numbers the ports.
ALGORITHMS = {
    "flexmatch": "hard_label True, T 0.5, p_cutoff 0.95, ulb_loss_ratio 1.0, uratio 7",
    "fixmatch": "hard_label True, T 0.5, p_cutoff 0.95, ulb_loss_ratio 1.0, uratio 7",
    "uda": "TSA_schedule none, T 0.4, p_cutoff 0.8, ulb_loss_ratio 1.0, uratio 7",
    "pseudolabel": "ulb_loss_ratio 1.0, uratio 1",
    "fullysupervised": "",
    "remixmatch": "alpha 0.75, T 0.5, ulb_loss_ratio 1.0, w_kl 0.5, w_match 1.5, w_rot 0.5, use_dm True, use_xe True, "
                  "warm_up 0.015625, uratio 1",
    "mixmatch": "uratio 1, alpha 0.5, T 0.5, ulb_loss_ratio 100, ramp_up 0.4",
    "meanteacher": "uratio 1, ulb_loss_ratio 50, unsup_warm_up 0.4",
    "pimodel": "ulb_loss_ratio 10, uratio 1",
    "vat": "",
    "freematch": "hard_label True, T 0.5, ulb_loss_ratio 1.0, ent_loss_ratio 0.0, uratio 7",
    "freematch_entropy": "hard_label True, T 0.5, ulb_loss_ratio 1.0, ent_loss_ratio 0.01, uratio 7",
    "softmatch": "hard_label True, T 0.5, ulb_loss_ratio 1.0, uratio 7, dist_align True",
}
FLEX = {"uda_flex": "uda", "pseudolabel_flex": "pseudolabel"}  # the same with `use_flex: True`
LEARNERS = (*ALGORITHMS, *FLEX, "defixmatch", "sequencematch")  # the scripts that train, <name>.py
ON_IMAGENET = ("fixmatch", "flexmatch")
WITH_TEN_LABELS = ("fixmatch", "flexmatch", "meanteacher", "mixmatch", "pimodel", "pseudolabel", "remixmatch", "uda",
                   "vat")
FIRST_PORT, FIRST_FLEX_PORT = 10001, 11121

# dataset: network, classes, depth, width, weight decay, numbers of labels
DATASETS = {
    "cifar10": ("WideResNet", 10, 28, 2, "0.0005", (40, 250, 4000)),
    "cifar100": ("WideResNet", 100, 28, 8, "0.001", (400, 2500, 10000)),
    "svhn": ("WideResNet", 10, 28, 2, "0.0005", (40, 250, 1000)),
    "stl10": ("WideResNetVar", 10, 28, 2, "0.0005", (40, 250, 1000)),
    "imagenet": ("ResNet50", 1000, 0, 0, "0.0003", (100000,)),
}

DIGITS = """\
# scikit-learn's handwritten digits (8x8, one channel) with four labels a class: seconds to a minute on a CPU.
# The published constants fit 2^20 iterations of 32x32 images; those that depend on length and size are shortened.
save_dir: ./saved_models
save_name: {name}
overwrite: True
use_tensorboard: False

dataset: digits
num_classes: 10
num_labels: 40
seed: 0

num_train_iter: 300
num_eval_iter: 15
num_save_iter: 100
batch_size: 32

# Averages over a third of the run; the statistics of batch norm stand in for those of the averaged weights.
ema_m: 0.99
bn_momentum: 0.01
{own}
optim: SGD
lr: 0.03
momentum: 0.9
weight_decay: 0.0005

# 0.08 million parameters: enough for 8x8 pixels.
net: WideResNet
depth: 10
widen_factor: 1

# A mirrored 2 is no digit, and 4 pixels are half of the image: shift by up to one pixel, in fractions, over black.
weak_flip: False
weak_pad: 1
weak_pad_mode: zero
weak_subpixel: True

alg: {alg}
"""
# Further keys on the digits; a value of the same key overrules the published one.
ON_DIGITS = {
    "freematch": "ema_p 0.99", "freematch_entropy": "ema_p 0.99", "softmatch": "ema_p 0.99",
    "fullysupervised": "all_labels True",
    "vat": "uratio 1, vat_eps 1.0, vat_xi 0.01",  # 64 pixels in place of 3072: the same length for each of them
    "defixmatch": "hard_label True, T 0.5, p_cutoff 0.95, ulb_loss_ratio 0.5, uratio 7",
    "sequencematch": "hard_label True, T 0.5, p_cutoff 0.95, ulb_loss_ratio 1.0, kl_loss_ratio 1.0, uratio 7",
    "pseudolabel": "uratio 7, p_cutoff 0.8", "pseudolabel_flex": "uratio 7, p_cutoff 0.8",
    "meanteacher": "uratio 7, ulb_loss_ratio 1", "remixmatch": "uratio 3, w_rot 0.1, strong_ops 1",
}


def all_files() -> dict[str, str]:
    """Return the text of every file, by its path below config/."""
    files = {}
    for name, values in published():
        files[name] = "".join(f"{key}: {value}\n" for key, value in values.items())
    for alg in LEARNERS:
        own = pairs(ALGORITHMS.get(FLEX.get(alg, alg), "")) | pairs(ON_DIGITS.get(alg, ""))
        own |= {"use_flex": "True"} if alg in FLEX else {}
        lines = "".join(f"{key}: {value}\n" for key, value in own.items())
        name = f"{alg}_digits_40_0"
        files[f"{alg}/{name}.yaml"] = DIGITS.format(name=name, alg=alg, own=f"\n{lines}" if lines else "")
    return files


def published() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (path below config/, keys and values) of the 191 published files."""
    port = FIRST_PORT
    for alg, own in ALGORITHMS.items():
        for dataset, (*_, numbers_of_labels) in DATASETS.items():
            if dataset == "imagenet" and alg not in ON_IMAGENET:
                continue
            ten = (10,) if dataset == "cifar10" and alg in WITH_TEN_LABELS else ()
            for labels in (*ten, *numbers_of_labels):
                yield published_file(alg, own, dataset, labels, port)
            port += 1
    port = FIRST_FLEX_PORT
    for alg, plain in FLEX.items():
        for dataset in ("cifar10", "cifar100", "svhn", "stl10"):
            for labels in DATASETS[dataset][-1]:
                name, values = published_file(alg, ALGORITHMS[plain], dataset, labels, port)
                yield name, {**values, "use_flex": "True"}
            port += 1


def published_file(alg: str, own: str, dataset: str, labels: int, port: int) -> tuple[str, dict[str, str]]:
    """Return one published file; ImageNet has longer runs of smaller batches."""
    net, classes, depth, width, weight_decay, _ = DATASETS[dataset]
    name = f"{alg}_{dataset}_{labels}_0"
    steps, evaluation, batch, test_batch = (2000000, 10000, 32, 256) if dataset == "imagenet" else (
        1048576, 5000, 64, 1024)
    values = pairs(
        f"save_dir ./saved_models, save_name {name}, resume False, load_path None, overwrite True, "
        f"use_tensorboard True, epoch 1, num_train_iter {steps}, num_eval_iter {evaluation}, num_labels {labels}, "
        f"batch_size {batch}, eval_batch_size {test_batch}")
    values |= pairs(own) | pairs(
        f"ema_m 0.999, optim SGD, lr 0.03, momentum 0.9, weight_decay {weight_decay}, amp False, net {net}, "
        f"net_from_name False, depth {depth}, widen_factor {width}, leaky_slope 0.1, dropout 0.0, data_dir ./data, "
        f"dataset {dataset}, train_sampler RandomSampler, num_classes {classes}, num_workers 1, alg {alg}, seed 0, "
        f"world_size 1, rank 0, multiprocessing_distributed True, dist_url tcp://127.0.0.1:{port}, "
        "dist_backend nccl, gpu None")
    return f"{alg}/{name}.yaml", values


def pairs(text: str) -> dict[str, str]:
    """Return "a 1, b 2" as {"a": "1", "b": "2"}."""
    return dict(pair.split() for pair in text.split(", ") if pair)


def main() -> None:
    parse(__doc__, ())
    files = all_files()
    for name, text in files.items():
        make_dir((CONFIG / name).parent)
        write_text(CONFIG / name, text)
    print(f"{len(files)} files written below {CONFIG}")


if __name__ == "__main__":
    run_main(main)
