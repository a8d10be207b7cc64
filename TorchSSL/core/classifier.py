"""A trained classifier from its checkpoint: the published ones, those of the original code, and those of our runs."""
from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.cli import UserError
from shared.data.images import ImageSet
from shared.data.pool import Pool
from shared.distributed import World, broadcast_value, start
from shared.training.checkpoint import read_checkpoint, weights_in
from TorchSSL.core.data import NORMALISATION, TrainingData, load_pools, load_split
from TorchSSL.core.evaluation import predict
from TorchSSL.core.networks import build_network, first_stride_for
from TorchSSL.core.photographs import PhotographPool, PhotographSet, make_pool

# Under which names weights are kept, ours and the published ones first, then those of older trainers.
AVERAGED, TRAINED = ("ema_model", "eval_model"), ("model", "train_model")
# USB, the successor of TorchSSL, has ImageNet's numbers on CIFAR-10, and its wide networks call `fc` `classifier`.
USB_HEAD, USB_NORMALISATION = "classifier.", {"cifar10": NORMALISATION["imagenet"]}
NETWORK_OPTIONS = ("net", "net_from_name", "depth", "widen_factor", "leaky_slope", "dropout", "bn_momentum")


@dataclass(frozen=True)
class Classifier:
    """A network in eval mode and what to normalise its images with (None: the data set's own)."""

    net: torch.nn.Module
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def strip_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict without the `module.` that data-parallel training puts before every name."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def make_network(options: Mapping[str, Any], num_classes: int, in_channels: int,
                 rotation_head: bool = False) -> torch.nn.Module:
    """Return the untrained network that the options (keys NETWORK_OPTIONS and `dataset`) describe; UserError."""
    return build_network(
        options["net"], num_classes, net_from_name=options["net_from_name"], depth=options["depth"],
        widen_factor=options["widen_factor"], leaky_slope=options["leaky_slope"], dropout=options["dropout"],
        first_stride=first_stride_for(options["dataset"]), rotation_head=rotation_head, in_channels=in_channels,
        bn_momentum=options["bn_momentum"])


def load_classifier(path: str, options: argparse.Namespace, images: ImageSet,
                    use_train_model: bool = False) -> Classifier:
    """Load the averaged (or the trained) weights of a checkpoint into its network: ours, TorchSSL's, DPT's or USB's.

    options: its network options and number of classes; those that its command line did not give are taken from the
    checkpoint where it is one of ours. images: the set it is for. Raises UserError for a file that is no checkpoint,
    or that of another network.
    """
    content = read_checkpoint(path)
    names = TRAINED if use_train_model else AVERAGED
    key = next((name for name in names if name in content), None)
    if key is None:
        raise UserError(f"--load_path: {path} holds no {names[0]} (only {', '.join(map(str, list(content)[:8]))}); "
                        "expected a checkpoint of a TorchSSL trainer")
    trained = options_in(content)
    chosen = {name: given_or_trained(options, trained, name) for name in NETWORK_OPTIONS}
    num_classes = given_or_trained(options, {"num_classes": images.num_classes, **trained}, "num_classes")
    state = strip_prefix(weights_in(content, key, path))
    mean, std = content.get("mean"), content.get("std")
    if USB_HEAD + "weight" in state and not chosen["net_from_name"]:
        state = {name.replace(USB_HEAD, "fc.", 1) if name.startswith(USB_HEAD) else name: value
                 for name, value in state.items()}
        mean, std = USB_NORMALISATION.get(options.dataset, (None, None))
        if mean is None:
            print(f"warning: {path} is a checkpoint of USB; its images of {options.dataset} are taken to be "
                  "normalised as TorchSSL does", file=sys.stderr)
    net = make_network({**chosen, "dataset": options.dataset}, num_classes, images.channels,
                       rotation_head="rot_classifier.weight" in state)
    check_fits(state, net, path)
    net.load_state_dict(state)
    return Classifier(net.eval(), mean, std)


def options_in(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options that a checkpoint of ours was trained with; {} for one of others."""
    options = content.get("options")
    return options if isinstance(options, Mapping) else {}


def given_or_trained(options: argparse.Namespace, trained: Mapping[str, Any], name: str) -> Any:
    """Return an option as the command line gives it, else as it was in the training, else its default."""
    return getattr(options, name) if name in options.given else trained.get(name, getattr(options, name))


def check_fits(state: Mapping[str, torch.Tensor], net: torch.nn.Module, path: str) -> None:
    """Raise UserError, naming the first difference, where weights are not those of this network."""
    ours = net.state_dict()
    different = next((f"{name} is {list(state[name].shape)} there, {list(ours[name].shape)} here" for name in ours
                      if name in state and state[name].shape != ours[name].shape), None)
    missing = sorted(set(ours) ^ set(state))
    if different or missing:
        reason = different or f"{missing[0]} is only in {'the network' if missing[0] in ours else 'the checkpoint'}"
        raise UserError(f"{path}: the weights of another network ({reason}); give --net, --depth, --widen_factor, "
                        "--num_classes and --dataset as in its training")


def keep_confident(data: TrainingData, options: argparse.Namespace, world: World) -> TrainingData:
    """Return the data without extra images to whose label the classifier --aug_filter gives too little probability.

    All ranks keep what rank 0 finds. Raises UserError where nothing is left. Without --aug_filter: the data itself.
    """
    if options.aug_filter is None:
        return data
    extra = data.labeled.subset(slice(data.num_real, None))
    judge_options = argparse.Namespace(**{**vars(options), "given": set()})  # its own network, not the one to train
    judge = load_classifier(options.aug_filter, judge_options, extra)
    pool = make_pool(extra, judge.mean or data.mean, judge.std or data.std, world.device)
    probabilities = predict(judge.net.to(world.device), pool, options.eval_batch_size).softmax(1)
    if probabilities.shape[1] != data.num_classes:
        raise UserError(f"--aug_filter: {options.aug_filter} knows {probabilities.shape[1]} classes, {options.dataset} "
                        f"has {data.num_classes}")
    confidence = probabilities.gather(1, pool.labels[:, None])[:, 0]
    kept = broadcast_value((confidence >= options.aug_confidence).nonzero()[:, 0].tolist(), world)
    if not kept:
        raise UserError(f"--aug_confidence {options.aug_confidence}: none of the {len(extra)} images of --aug_path "
                        f"reaches it (the largest is {confidence.max().item():.3f})")
    index = np.concatenate([np.arange(data.num_real), data.num_real + np.array(kept)])
    note = f"{len(kept)} of {len(extra)} extra images have a confidence of at least {options.aug_confidence}"
    return dataclasses.replace(data, labeled=data.labeled.subset(index), notes=(*data.notes, note))


def open_split(options: argparse.Namespace, split: str) -> tuple[
        torch.nn.Module, Pool | PhotographPool, ImageSet | PhotographSet]:
    """Return the classifier of --load_path on --device, and a split of the data set as it takes it. UserError.

    split: "train" (the unlabelled pool: all training images, those of STL-10 behind its unlabelled ones) or "test".
    Data set and folder are those of the training unless given.
    """
    device = start(options.device).device
    trained = options_in(read_checkpoint(options.load_path))
    options.dataset = given_or_trained(options, trained, "dataset")
    options.data_dir = given_or_trained(options, trained, "data_dir")
    if split == "train":
        images = load_pools(options.dataset, options.data_dir, options.download)[1]
    else:
        images = load_split(options.dataset, split, options.data_dir, options.download)
    classifier = load_classifier(options.load_path, options, images, options.use_train_model)
    mean, std = classifier.mean, classifier.std
    if mean is None or std is None:
        if options.dataset not in NORMALISATION:
            raise UserError(f"--load_path: {options.load_path} does not say how the images of {options.dataset} were "
                            "normalised; use a checkpoint of this project's trainer")
        mean, std = NORMALISATION[options.dataset]
    return classifier.net.to(device), make_pool(images, tuple(mean), tuple(std), device), images


def predict_split(options: argparse.Namespace, split: str) -> tuple[torch.Tensor, ImageSet | PhotographSet]:
    """Return (float32 logits [N, C] on the CPU, images) of a split of the data set; see `open_split`."""
    net, pool, images = open_split(options, split)
    return predict(net, pool, options.batch_size).cpu(), images
