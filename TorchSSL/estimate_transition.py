"""How pseudo-labels err: an estimate of p(pseudo-label | class), for a second stage that knows it (TDSM).

    python estimate_transition.py --load_path=./saved_models/freematch_digits_10_1/latest_model.pth \\
        --save_path=./saved_models/freematch_digits_10_1/ --dest=transition.json --method=predictions

Two estimates, row = class, column = pseudo-label:

predictions   needs no label. Every image votes for the classes that the classifier sees in weakly augmented views of
              it; the votes are summed by pseudo-label (a joint estimate in the manner of confident learning, Northcutt
              et al. 2021) and each class's row divided by its sum. It finds classes between which the classifier
              wavers, and not those that it confuses with confidence.
held_out      --held_out N labelled images that the classifier has not seen, the same number of every class, are
              counted, and the other estimate's row counts as one image more. So a few labels a class suffice: a row of
              which nothing is known is that of the first estimate.

Writes transition_matrix and what it rests on; where true labels are known, also how far it is from the true one, which
takes no part in it.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.cli import UserError, run_main
from TorchSSL.core.options import COUNT, Flag, build_parser
from TorchSSL.get_labels import NETWORK_FLAGS, PREDICTION_FLAGS

if TYPE_CHECKING:
    import numpy as np
    import torch

    from shared.data.pool import Pool

METHODS = ("predictions", "held_out")
SMOOTHING = 1e-3  # every pseudo-label stays possible for every class, at this share of a row in all
PRIOR = 1.0       # images that the first estimate's row counts for beside those held out
ESTIMATE_FLAGS = (
    Flag("--save_path", str, "./saved_models/fixmatch", "folder of pseudo_label.npy and sampled_label_idx.npy"),
    Flag("--dest", str, "transition.json", "file to write, in --save_path unless it is a path"),
    Flag("--method", str, "predictions", "predictions or held_out"),
    Flag("--held_out", COUNT, None, "labelled images to hold out in all, a multiple of the classes (held_out)"),
    Flag("--held_out_idx", str, None, "hold out the images named in this .npy file in place of drawn ones"),
    Flag("--views", COUNT, 10, "views of every image"),
    Flag("--seed", int, 0, "seed of the views and of the images held out"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    groups = {"prediction": PREDICTION_FLAGS, "estimate": ESTIMATE_FLAGS, "network": NETWORK_FLAGS}
    options = build_parser("estimate_transition", __doc__, groups).parse_with_yaml(argv)
    if options.method not in METHODS:
        raise UserError(f"--method {options.method}: expected {' or '.join(METHODS)}")
    named = (options.held_out is not None) + (options.held_out_idx is not None)
    if named != (options.method == "held_out"):
        raise UserError("--method=held_out needs one of --held_out N and --held_out_idx FILE, and they need it")
    return options


def main() -> None:
    options = parse()
    import numpy as np

    from shared.training.files import atomic
    from TorchSSL.core.classifier import open_split

    net, pool, images = open_split(options, "train")
    folder, classes = Path(options.save_path), images.num_classes
    pseudo = read_labels(folder / "pseudo_label.npy", len(images), classes)
    estimate = rows_of(joint_of_votes(vote(net, pool, options, images.size, classes), pseudo), SMOOTHING)
    facts = {"method": options.method, "views": options.views, "seed": options.seed}
    if options.method == "held_out":
        index = held_out_index(options, images.labels, classes, folder / "sampled_label_idx.npy")
        counts = confusion(images.labels[index], pseudo[index], classes)
        estimate = rows_of(counts + PRIOR * estimate, SMOOTHING)
        facts |= {"held_out": len(index), "held_out_right": float(np.mean(images.labels[index] == pseudo[index]))}
    known = images.labels >= 0
    if known.any():
        true = rows_of(confusion(images.labels[known], pseudo[known], classes), 0.0)
        facts |= {"true_transition_matrix": true.tolist(), "error": distance(estimate, true),
                  "error_of_no_noise": distance(np.eye(classes), true)}
    dest = Path(options.dest) if Path(options.dest).name != options.dest else folder / options.dest
    with atomic(dest, "w") as file:
        json.dump({"transition_matrix": estimate.tolist(), "classes": list(images.classes), **facts}, file)
    print(f"{dest}: pseudo-labels of a class that are right, by this estimate: "
          f"{' '.join(f'{100 * value:.0f}' for value in np.diag(estimate))} %")
    if known.any():
        print(f"distance of a row from the true one (total variation): {facts['error']:.3f}; of a matrix without "
              f"noise: {facts['error_of_no_noise']:.3f}")


def vote(net: torch.nn.Module, pool: Pool, options: argparse.Namespace, size: tuple[int, int],
         classes: int) -> np.ndarray:
    """Return the share of --views weak views in which the classifier sees each class, float64 [N, C]."""
    import numpy as np
    import torch

    from shared.augment.views import WeakPolicy, draw_weak, weak
    from shared.training.checkpoint import read_checkpoint
    from shared.training.progress import Progress
    from shared.training.randomness import numpy_rng
    from TorchSSL.core.algorithm import classify

    trained = read_checkpoint(options.load_path).get("options", {})
    names = {"flip": "weak_flip", "pad": "weak_pad", "pad_mode": "weak_pad_mode", "subpixel": "weak_subpixel"}
    policy = WeakPolicy(**{name: trained[flag] for name, flag in names.items() if flag in trained})
    votes = np.zeros((len(pool), classes))
    progress = Progress("votes", options.views * len(pool), "views")
    with torch.no_grad():
        for view in range(options.views):
            draws = draw_weak(len(pool), numpy_rng(options.seed, view, "views for the transition"), size, policy)
            for start in range(0, len(pool), options.batch_size):
                index = np.arange(start, min(start + options.batch_size, len(pool)))
                batch = weak(pool.take(index), draws[index], pool.mean, pool.std)
                votes[index, classify(net, batch).argmax(1).cpu().numpy()] += 1
                progress.advance(len(index))
    progress.close()
    return votes / options.views


def joint_of_votes(votes: np.ndarray, pseudo: np.ndarray) -> np.ndarray:
    """Return float64 [C, C]: votes [N, C] for each class (row), summed over the images of each pseudo-label."""
    import numpy as np

    joint = np.zeros((votes.shape[1], votes.shape[1]))
    np.add.at(joint.T, pseudo, votes)
    return joint


def confusion(labels: np.ndarray, pseudo: np.ndarray, classes: int) -> np.ndarray:
    """Return counts float64 [C, C]: row = label, column = pseudo-label."""
    import numpy as np

    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, pseudo), 1)
    return counts


def rows_of(joint: np.ndarray, smoothing: float) -> np.ndarray:
    """Return rows that sum to 1, with a share `smoothing` spread over all columns; the identity's for an empty row."""
    import numpy as np

    sums = joint.sum(1, keepdims=True)
    rows = np.where(sums > 0, joint / np.where(sums > 0, sums, 1), np.eye(len(joint)))
    return (1 - smoothing) * rows + smoothing / len(joint)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the total variation between rows, averaged over classes: 0 (equal) to 1."""
    import numpy as np

    return float(np.abs(a - b).sum(1).mean() / 2)


def read_labels(file: Path, count: int, classes: int) -> np.ndarray:
    """Return the pseudo-labels int64 [count] that get_labels.py wrote; UserError for others."""
    import numpy as np

    from shared.data.pickles import load_array

    if not file.exists():
        raise UserError(f"--save_path: there is no {file}; make it with get_labels.py")
    labels = load_array(file)
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{file}: expected {count} labels from 0 to {classes - 1}, those of the training images; make "
                        "it with get_labels.py for this data set")
    return labels.astype(np.int64)


def held_out_index(options: argparse.Namespace, labels: np.ndarray, classes: int, used: Path) -> np.ndarray:
    """Return positions in the pool, int64, of the images whose labels are counted: none that the classifier has seen.

    labels: of the pool, -1 where unknown. used: the labelled images of the classifier's run. Raises UserError where a
    class has too few others, and for a file that names one of them.
    """
    import numpy as np

    from shared.data.datasets import has_split, load_dataset
    from shared.training.randomness import numpy_rng
    from TorchSSL.core.data import read_index

    # Indices count the images that labels are drawn from, which are the last ones of the pool.
    start = 0
    if has_split(options.dataset, "unlabeled"):
        start = len(labels) - len(load_dataset(options.dataset, "train", options.data_dir))
    seen = read_index(str(used), labels[start:], "--save_path") if used.exists() else np.zeros(0, np.int64)
    if options.held_out_idx is not None:
        index = read_index(options.held_out_idx, labels[start:], "--held_out_idx")
        if both := sorted(set(index.tolist()) & set(seen.tolist())):
            raise UserError(f"--held_out_idx: the classifier was trained on image {both[0]} of {options.held_out_idx}")
        return start + index
    if options.held_out % classes:
        raise UserError(f"--held_out {options.held_out} is not a multiple of the {classes} classes")
    rng, each, parts = numpy_rng(options.seed, 0, "held-out labels"), options.held_out // classes, []
    for label in range(classes):
        free = np.setdiff1d(np.flatnonzero(labels[start:] == label), seen)
        if len(free) < each:
            raise UserError(f"--held_out {options.held_out}: class {label} has {len(free)} labelled images besides "
                            f"those of the training, fewer than {each}")
        parts.append(rng.choice(free, each, replace=False))
    return start + np.sort(np.concatenate(parts))


if __name__ == "__main__":
    run_main(main)
