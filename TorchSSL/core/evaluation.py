"""Evaluation: predictions in eval mode, the published metrics and the confusion matrix.

Metrics are fractions under their published names: `eval/loss` (mean cross-entropy in nats), `eval/top-1-acc`,
`eval/top-5-acc`, `eval/precision`, `eval/recall` and `eval/F1` (means over the classes that occur), and `eval/AUC`
(macro average over all ordered pairs of classes of the area under the ROC curve, of softmax scores).
"""
from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch.nn import functional as F

from shared.data.pool import Pool
from shared.distributed import World, gather
from TorchSSL.core.algorithm import classify
from TorchSSL.core.photographs import PhotographPool, evaluated

# One-vs-one AUC looks at every pair of classes: beyond this many classes it is left to the last evaluation, and beyond
# the second number left out (ImageNet has half a million pairs).
AUC_EVERY_TIME, AUC_AT_ALL = 20, 200
LOGGED_CLASSES = 100  # confusion matrices of more classes are not written into the log


@torch.no_grad()
def predict(net: torch.nn.Module, pool: Pool | PhotographPool, batch_size: int = 1024,
            world: World | None = None) -> torch.Tensor:
    """Return float32 logits [N, C] of all images of `pool` in order, on its device; each rank computes its part.

    net: in eval mode; takes normalised float [n, channels, H, W] (of several outputs the first counts).
    """
    world = world or World()
    part = -(-len(pool) // world.size)  # the last parts repeat the last image, so that all ranks gather equal shapes
    indices = np.minimum(np.arange(world.rank * part, (world.rank + 1) * part), len(pool) - 1)
    if not part:
        raise ValueError("there is nothing to predict: the pool is empty")
    parts = [indices[start:start + batch_size] for start in range(0, part, batch_size)]
    logits = [classify(net, images) for images in evaluated(pool, parts)]
    return gather(torch.cat(logits), world)[:len(pool)]


def metrics(logits: torch.Tensor, labels: torch.Tensor, auc: bool | None = None) -> dict[str, float]:
    """Return the published metrics of float logits [N, C] for int64 labels [N] in 0..C-1.

    auc: whether to compute `eval/AUC`; None: up to 20 classes. It is left out where a class is absent from `labels` or
    a logit is not finite.
    """
    labels = labels.to(logits.device)
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    truth, predicted = labels.cpu().numpy(), logits.argmax(1).cpu().numpy()
    counts = confusion_matrix(truth, predicted, logits.shape[1])
    right, true, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
    seen = true + guessed > 0
    values = {
        "eval/loss": F.cross_entropy(logits, labels).item(),
        "eval/top-1-acc": float(np.mean(predicted == truth)),
        "eval/top-5-acc": top.any(1).double().mean().item(),
        "eval/precision": float(np.mean((right / np.maximum(guessed, 1))[seen])),
        "eval/recall": float(np.mean((right / np.maximum(true, 1))[seen])),
        "eval/F1": float(np.mean((2 * right / np.maximum(true + guessed, 1))[seen])),
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
    """Return the share of pairs in which the positive score is the larger one; ties count half."""
    below = (np.searchsorted(np.sort(negative), positive, side) for side in ("left", "right"))
    return float(np.mean(sum(below)) / 2 / len(negative))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return int64 counts [C, C]: row = true class, column = predicted class."""
    counts = np.bincount(np.asarray(labels) * num_classes + np.asarray(predicted), minlength=num_classes ** 2)
    return counts.reshape(num_classes, num_classes)


def confusion_text(counts: np.ndarray) -> str:
    """Return the row-normalised confusion matrix as the text that the log carries."""
    rows = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with np.printoptions(precision=2, suppress=True, threshold=10_000, linewidth=1000):
        return f"confusion matrix:\n{rows}"


@contextlib.contextmanager
def eval_mode(net: torch.nn.Module):
    """Put `net` into eval mode for the block, then back into the mode it was in."""
    was_training = net.training
    try:
        yield net.eval()
    finally:
        net.train(was_training)
