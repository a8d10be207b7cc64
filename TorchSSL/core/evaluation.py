"""The predictions of a trained classifier and their metrics.

Metrics are fractions under their published names: `eval/loss` (mean cross-entropy in nats), `eval/top-1-acc`,
`eval/top-5-acc`, `eval/precision`, `eval/recall` and `eval/F1` (means over the classes that occur), and `eval/AUC`
(macro average over all ordered pairs of classes of the area under the ROC curve, of softmax scores).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shared.cli import UserError, less_memory
from shared.data.classes import has_names, match_labels
from shared.data.images import ImageSet, with_names
from shared.data.photographs import PhotographSet
from shared.data.pool import PhotographPool, Pool, evaluated, make_pool
from shared.distributed import World, broadcast_value, gather, start
from shared.training.checkpoint import read_checkpoint
from TorchSSL.core.algorithm import BLOCK, classify, in_blocks
from TorchSSL.core.data import TrainingData, load_pools, load_split
from TorchSSL.core.networks import OPTIONS, trained_options

# One-vs-one AUC looks at every pair of classes: with more classes than the first number only the last evaluation
# computes it, with more than the second none (ImageNet has half a million pairs).
AUC_EVERY_TIME, AUC_AT_ALL = 20, 200
LOGGED_CLASSES = 100  # larger confusion matrices are not written into the log


# ---------------------------------------------------------------- predictions and metrics


@torch.no_grad()
def predict(net: nn.Module, pool: Pool | PhotographPool, batch_size: int = 1024,
            world: World | None = None) -> torch.Tensor:
    """Return float32 logits [N, C] of all images of `pool` in order, on its device; each rank computes its part.

    net: in eval mode; takes normalised float [n, channels, H, W] (of several outputs the first counts).
    """
    world = world or World()
    part = -(-len(pool) // world.size)  # the last parts repeat the last image: ranks gather equal shapes
    indices = np.minimum(np.arange(world.rank * part, (world.rank + 1) * part), len(pool) - 1)
    parts = [indices[start:start + batch_size] for start in range(0, part, batch_size)]
    logits = [classify(net, images) for images in evaluated(pool, parts)]
    return gather(torch.cat(logits), world)[:len(pool)]


def predict_in_blocks(net: nn.Module, pool: Pool | PhotographPool, batch_size: int) -> torch.Tensor:
    """Return float32 logits [N, C] on the CPU as `predict` does; they do not depend on `batch_size`."""
    return predict(lambda images: in_blocks(net, images), pool, -(-batch_size // BLOCK) * BLOCK).cpu()


def metrics(logits: torch.Tensor, labels: torch.Tensor, auc: bool | None = None) -> dict[str, float]:
    """Return the published metrics of float logits [N, C] for int64 labels [N] in 0..C-1.

    auc: whether to compute `eval/AUC`; None: up to 20 classes. It is left out if `labels` lack a class or a logit is
    not finite.
    """
    labels = labels.to(logits.device)
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    truth, predicted = labels.cpu().numpy(), logits.argmax(1).cpu().numpy()
    counts = confusion_matrix(truth, predicted, logits.shape[1])
    right, true, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
    occurs = true + guessed > 0
    values = {
        "eval/loss": F.cross_entropy(logits, labels).item(),
        "eval/top-1-acc": float(np.mean(predicted == truth)),
        "eval/top-5-acc": top.any(1).double().mean().item(),
        "eval/precision": float(np.mean((right / np.maximum(guessed, 1))[occurs])),
        "eval/recall": float(np.mean((right / np.maximum(true, 1))[occurs])),
        "eval/F1": float(np.mean((2 * right / np.maximum(true + guessed, 1))[occurs])),
    }
    if auc is None:
        auc = logits.shape[1] <= AUC_EVERY_TIME
    auc = auc and logits.shape[1] <= AUC_AT_ALL
    scores = logits.softmax(1).double().cpu().numpy()
    if auc and len(np.unique(truth)) == logits.shape[1] and np.isfinite(scores).all():
        values["eval/AUC"] = _auc(truth, scores)
    return values


def _auc(truth: np.ndarray, scores: np.ndarray) -> float:
    scores = scores / scores.sum(1, keepdims=True)
    of_class = [scores[truth == c] for c in range(scores.shape[1])]
    if len(of_class) == 2:
        return _area(of_class[1][:, 1], of_class[0][:, 1])
    return float(np.mean([_area(own[:, c], other[:, c]) for c, own in enumerate(of_class)
                          for d, other in enumerate(of_class) if d != c]))


def _area(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the fraction of pairs in which the positive score is the larger one; ties count half."""
    below = (np.searchsorted(np.sort(negative), positive, side) for side in ("left", "right"))
    return float(np.mean(sum(below)) / 2 / len(negative))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return int64 counts [C, C]: row = true class, column = predicted class."""
    counts = np.bincount(np.asarray(labels) * num_classes + np.asarray(predicted), minlength=num_classes ** 2)
    return counts.reshape(num_classes, num_classes)


def confusion_text(counts: np.ndarray) -> str:
    """Return the row-normalised confusion matrix as text for the log."""
    rows = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with np.printoptions(precision=2, suppress=True, threshold=10_000, linewidth=1000):
        return f"confusion matrix:\n{rows}"


def given_or_trained(options: SimpleNamespace, trained: Mapping[str, Any], name: str) -> Any:
    """Return an option of the command line, else of the training, else its default."""
    return getattr(options, name) if name in options.given else trained.get(name, getattr(options, name))


# ---------------------------------------------------------------- what scripts do with a classifier


def open_split(options: SimpleNamespace, split: str) -> tuple[nn.Module, Pool | PhotographPool,
                                                              ImageSet | PhotographSet]:
    """Return the classifier of --load_path on --device, and a split of the data set as its pool and as images.

    split: "train" (the unlabelled pool: all training images, those of STL-10 after its unlabelled ones) or "test".
    Data set and folder are those of the training unless given. Labels are numbers of the classifier's classes, by
    name. Raises UserError.
    """
    from TorchSSL.core.classifier import open_classifier  # knows the networks of all papers, which no trainer needs

    device = start(options.device).device
    trained = trained_options(read_checkpoint(options.load_path))
    options.dataset = given_or_trained(options, trained, "dataset")
    options.data_dir = given_or_trained(options, trained, "data_dir")
    if split == "train":
        images = load_pools(options.dataset, options.data_dir, options.download)[1]
    else:
        images = load_split(options.dataset, split, options.data_dir, options.download)
    given = {name: getattr(options, name) for name in (*OPTIONS, "num_classes") if name in options.given}
    classifier = open_classifier(options.load_path, device, options.dataset, options.use_train_model, given)
    if classifier.channels != images.channels:
        raise UserError(f"{options.load_path}: classifies images of {classifier.channels} channel(s), those of "
                        f"{options.dataset} have {images.channels}")
    if has_names(classifier.classes):
        images = with_names(images, classifier.classes, options.dataset)
    return classifier.net, make_pool(images, classifier.mean, classifier.std, device), images


def predict_split(options: SimpleNamespace, split: str) -> tuple[torch.Tensor, ImageSet | PhotographSet]:
    """Return (float32 logits [N, C] on the CPU, images) of a split of the data set; see `open_split`."""
    net, pool, images = open_split(options, split)
    return predict_in_blocks(net, pool, options.batch_size), images


@less_memory("--eval_batch_size")
def keep_confident(data: TrainingData, options: SimpleNamespace, world: World) -> TrainingData:
    """Return the data without extra images to whose label the classifier --aug_filter gives too little probability.

    All ranks keep the choice of rank 0. Raises UserError if none is left. Without --aug_filter: the data itself.
    """
    if options.aug_filter is None:
        return data
    from TorchSSL.core.classifier import open_classifier  # as in open_split

    extra = data.labeled.subset(slice(data.num_real, None))
    judge = open_classifier(options.aug_filter, world.device, options.dataset)
    if judge.channels != extra.channels:
        raise UserError(f"--aug_filter: {options.aug_filter} classifies images of {judge.channels} channel(s), those "
                        f"of {options.dataset} have {extra.channels}")
    pool = make_pool(extra, judge.mean, judge.std, world.device)
    probabilities = predict(judge.net, pool, options.eval_batch_size).softmax(1)
    if probabilities.shape[1] != data.num_classes:
        raise UserError(f"--aug_filter: {options.aug_filter} knows {probabilities.shape[1]} classes, {options.dataset} "
                        f"has {data.num_classes}")
    labels = match_labels(extra.labels, data.unlabeled.classes, judge.classes, f"--aug_filter: {options.aug_filter}")
    confidence = probabilities.gather(1, torch.from_numpy(labels).to(probabilities.device)[:, None])[:, 0]
    kept = broadcast_value((confidence >= options.aug_confidence).nonzero()[:, 0].tolist(), world)
    if not kept:
        raise UserError(f"--aug_confidence {options.aug_confidence}: none of the {len(extra)} images of --aug_path "
                        f"reaches it (the largest is {confidence.max().item():.3f})")
    index = np.concatenate([np.arange(data.num_real), data.num_real + np.array(kept)])
    note = f"{len(kept)} of {len(extra)} extra images have a confidence of at least {options.aug_confidence}"
    return dataclasses.replace(data, labeled=data.labeled.subset(index), notes=(*data.notes, note))
