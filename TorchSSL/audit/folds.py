"""Class probabilities out of sample: every image is judged by a classifier that has not seen it."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch.nn import functional as F

from shared.augment.views import WeakPolicy, draw_weak, weak
from shared.data.images import ImageSet
from shared.data.pool import make_pool
from shared.distributed import World
from shared.networks import train_mode
from shared.training.ema import EMA
from shared.training.files import write_array
from shared.training.precision import set_arithmetic, to_device
from shared.training.progress import Progress
from shared.training.randomness import numpy_rng
from shared.training.record import Record
from TorchSSL.core.algorithm import classify
from TorchSSL.core.data import channel_statistics
from TorchSSL.core.evaluation import predict
from TorchSSL.core.networks import make_network
from TorchSSL.core.trainer import cosine, make_optimizer

EMA_MOMENTUM = 0.99  # of the averaged weights, which judge
Judge = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # (positions to learn, to judge, fold) -> float [n, K]


def out_of_sample(labels: np.ndarray, num_classes: int, judge: Judge, options: SimpleNamespace, folder: Path,
                  settings: dict[str, object], inputs: dict[str, object]) -> np.ndarray:
    """Return p(class | image), float64 [N, K], by --folds classifiers; an image without a label is judged by all.

    labels: int64 [N], -1 unknown. Each finished fold is kept in `folder`, where an interrupted audit continues.
    """
    known, unknown = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    probabilities = np.zeros((len(labels), num_classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class with fewer images than folds
        split = StratifiedKFold(options.folds, shuffle=True, random_state=options.seed)
        parts = list(split.split(known, labels[known]))
    for fold, (learned, judged) in enumerate(parts):
        file = folder / f"fold_{fold}.npy"
        record = Record(file, {**settings, "fold": fold, "folds": options.folds, "seed": options.seed}, inputs)
        positions = np.concatenate([known[judged], unknown])
        if not record.is_complete(options.overwrite):
            found = judge(known[learned], positions, fold)
            write_array(file, found)
            record.write()
        probabilities[positions] += np.load(file)
    return probabilities / probabilities.sum(1, keepdims=True)


def network_judge(images: ImageSet, dataset: str, options: SimpleNamespace, world: World) -> Judge:
    """Return a judge that trains the network of the options on uint8 images, with shifted views and averaged weights.

    The draws of a step are a function of (seed, fold, step).
    """
    mean, std = channel_statistics(dataset, images)
    pool = make_pool(images, mean, std, world.device)
    policy = WeakPolicy(options.weak_flip, max(1, min(images.size) // 8), "zero")
    settings = {"leaky_slope": 0.1, "dropout": 0.0, "bn_momentum": 0.1, "net_from_name": False, "dataset": dataset,
                "net": options.net, "depth": options.depth, "widen_factor": options.widen_factor}

    def judge(learned: np.ndarray, judged: np.ndarray, fold: int) -> np.ndarray:
        set_arithmetic(False)
        torch.manual_seed(options.seed * 1_000_003 + fold)
        net = make_network(settings, images.num_classes, images.channels, size=tuple(images.size))
        net = net.to(world.device, memory_format=torch.channels_last)
        optimizer = make_optimizer(net, SimpleNamespace(optim="SGD", lr=options.lr, momentum=0.9, weight_decay=5e-4,
                                                        strict=False, head_lr=None))
        average, labels = EMA(net), to_device(images.labels, world.device)
        train_mode(net)
        progress = Progress(f"fold {fold + 1} of {options.folds}", options.num_train_iter, "iterations")
        for step in range(options.num_train_iter):
            rng = numpy_rng(options.seed, step, f"audit fold {fold}")
            batch = learned[rng.integers(len(learned), size=options.batch_size)]
            views = weak(pool.take(batch), draw_weak(len(batch), rng, images.size, policy), mean, std)
            views = views.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(classify(net, views), labels[to_device(batch, world.device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = options.lr * cosine(step, options.num_train_iter)
            optimizer.step()
            average.update(net, min(EMA_MOMENTUM, step / (step + 10)))
            progress.advance()
        progress.close()
        rows = make_pool(images.subset(judged), mean, std, world.device)
        return predict(average.module, rows).double().softmax(1).cpu().numpy()

    return judge


def linear_judge(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Judge:
    """Return a judge by logistic regression on features float32 [N, D]."""
    def judge(learned: np.ndarray, judged: np.ndarray, fold: int) -> np.ndarray:
        found = np.zeros((len(judged), num_classes))
        present = np.unique(labels[learned])
        if len(present) == 1:
            found[:, present] = 1
            return found
        model = LogisticRegression(max_iter=2000).fit(features[learned], labels[learned])
        found[:, model.classes_] = model.predict_proba(features[judged])
        return found

    return judge
